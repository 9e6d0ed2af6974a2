"""The stand-in Hub's answers to those who write: creation, pre-upload, LFS, commit."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.support.hub_server import HubServer

FORBIDDEN_OWNER = "others"  # that the token may not write to
DROP = 0  # close the connection instead of an answer

Answer = tuple[int, Any]


def written(hub: HubServer, path: str, body: bytes, *, authorized: bool) -> Answer:
    """Status and JSON of the answer; what it changed is in `hub`."""
    kind = next(
        item
        for item in ("create", "validate", "batch", "verify", "preupload", "commit", "lfs")
        if f"/{item}" in path
    )
    faults = hub.upload_faults.get(kind, [])
    fault = faults.pop(0) if faults else None
    if isinstance(fault, int):
        return fault, {}
    if kind == "lfs":  # like any signed address, without a token
        hub.on_upload()
        hub.uploads[path.removeprefix("/lfs/")] = body
        return 200, {}
    answer = _answer(hub, kind, path, _parsed(body)) if authorized else (401, {})
    return (DROP, {}) if fault == "lost" else answer


def _answer(hub: HubServer, kind: str, path: str, data: list[Any]) -> Answer:
    if kind == "validate":
        return 200, {"errors": [], "warnings": []}
    if kind == "create":
        return _created(hub, data[0])
    if kind == "batch":
        return 200, {"transfer": "basic", "objects": [_object(hub, item) for item in data[0]["objects"]]}
    if kind == "verify":
        return _verified(hub, data[0]), {}
    return _of_repository(hub, kind, path, data)


def _verified(hub: HubServer, asked: Any) -> int:
    sent = hub.uploads.get(asked["oid"], b"")
    return 200 if (hashlib.sha256(sent).hexdigest(), len(sent)) == (asked["oid"], asked["size"]) else 422


def _of_repository(hub: HubServer, kind: str, path: str, data: list[Any]) -> Answer:
    match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
    if match is None or match[1] not in hub.repositories:
        return 404, {}
    if kind == "commit":
        return _committed(hub, match[1], data)
    return 200, {"files": [_mode(hub, match[1], item) for item in data[0]["files"]]}


def _parsed(body: bytes) -> list[Any]:
    try:
        return [json.loads(body)]
    except ValueError:
        return [json.loads(line) for line in body.splitlines()]


def _created(hub: HubServer, asked: Any) -> Answer:
    from tests.support.hub_server import Repository

    name = f"{asked['organization']}/{asked['name']}"
    if asked["organization"] == FORBIDDEN_OWNER:
        return 403, {}
    if name in hub.repositories:
        return 409, {}
    files = {".gitattributes": b"*.safetensors filter=lfs\n"}
    private = asked.get("visibility") == "private"
    hub.repositories[name] = Repository({"0" * 40: files}, {"main": "0" * 40}, private=private)
    return 200, {"url": f"{hub.endpoint}/{name}"}


def _object(hub: HubServer, asked: Any) -> dict[str, Any]:
    if asked["oid"] in hub.uploads:
        return dict(asked)
    actions = {
        "upload": {"href": f"{hub.endpoint}/lfs/{asked['oid']}"},
        "verify": {"href": f"{hub.endpoint}/lfs/verify"},
    }
    return {**asked, "actions": actions}


def _mode(hub: HubServer, name: str, asked: Any) -> dict[str, Any]:
    from tests.support.hub_server import LARGE_BYTES

    files = hub.repositories[name].files[hub.repositories[name].branches["main"]]
    large = asked["size"] >= LARGE_BYTES
    oid = None
    if (data := files.get(asked["path"])) is not None:
        git = hashlib.sha1(b"blob %d\0" % len(data) + data)
        oid = (hashlib.sha256(data) if large else git).hexdigest()
    mode = "lfs" if large else "regular"
    return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def _committed(hub: HubServer, name: str, lines: list[Any]) -> Answer:
    repository = hub.repositories[name]
    head = repository.branches["main"]
    header, *changes = lines
    if header["value"].get("parentCommit", head) != head:
        return 412, {}
    files = dict(repository.files[head])
    for change in changes:
        value = change["value"]
        if change["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif change["key"] == "lfsFile":
            if value["oid"] not in hub.uploads:
                return 400, {"error": f"{value['path']} was not uploaded"}
            files[value["path"]] = hub.uploads[value["oid"]]
        elif change["key"] == "deletedFile":
            del files[value["path"]]
    commit = hashlib.sha1(f"{head}{sorted(files)}{len(repository.files)}".encode()).hexdigest()
    repository.files[commit] = files
    repository.branches["main"] = commit
    return 200, {"commitUrl": f"{hub.endpoint}/{name}/commit/{commit}", "commitOid": commit}
