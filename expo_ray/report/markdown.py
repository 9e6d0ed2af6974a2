"""Text from outside as Markdown that only shows it: it makes no link, HTML, table cell or line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from expo_ray.text import shown

# What a reader of a card has patience for; texts of our own are shorter.
_LONGEST_PLAIN = 2000
# Entities are text wherever they stand, where a backslash is none inside code.
_ENTITY = {character: f"&#{ord(character)};" for character in "`|<>&\\*_[]()~:@#!"}
_IN_PLAIN = re.compile(
    r"[`|<>\\*~]"
    r"|^[-+#=]|^[0-9](?=[0-9]{0,8}[.)](?:\s|$))"  # what a list or a heading may begin with
    r"|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # inside a word it is no emphasis
    r"|(?<=\])[(\[]"  # the rest of a link
    r"|&(?=#|\w+;)"
    r"|:(?=//)|(?i:(?<=www)\.|(?<=mailto):|(?<=xmpp):)|@"  # what GitHub makes a link of
)
_NOT_IN_CODE = re.compile(r"[`|\\]|^ | $|^$")


def plain(text: object) -> str:
    """`text` in a sentence or in the cell of a table."""
    line = shown(" ".join(str(text).split()), _LONGEST_PLAIN)
    return _IN_PLAIN.sub(lambda match: f"&#{ord(match[0])};", line)


def code(text: object) -> str:
    """`text` as code, in a sentence or in the cell of a table."""
    line = shown(text)
    if not _NOT_IN_CODE.search(line):
        return f"`{line}`"
    return f"<code>{''.join(_ENTITY.get(character, character) for character in line)}</code>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
