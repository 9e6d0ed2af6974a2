"""Flags of the command line follow the fields of the job file."""

from __future__ import annotations

import argparse

import pytest

from expo_ray.cli.arguments import command_parser
from expo_ray.cli.flags import add_field
from expo_ray.config import PairOptions, RewardModel, Sampling


def options_of(command: str) -> dict[str, argparse.Action]:
    """The flags of a command, by their destination."""
    commands = next(
        action.choices
        for action in command_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return {action.dest: action for action in commands[command]._actions}


def test_choices_and_help_are_those_of_the_field() -> None:
    parser = argparse.ArgumentParser()
    for field in ("rounding", "seed", "allow_pickle"):
        add_field(parser, PairOptions, field)
    arguments = parser.parse_args(["--rounding", "reference", "--allow-pickle"])
    assert vars(arguments) == {"rounding": "reference", "seed": None, "allow_pickle": True}
    with pytest.raises(SystemExit):
        parser.parse_args(["--rounding", "upwards"])
    for field in ("rounding", "seed", "allow_pickle"):
        description = " ".join((PairOptions.model_fields[field].description or "").split())
        assert description in " ".join(parser.format_help().split()).replace("- ", "-")


def test_every_setting_of_sampling_is_a_flag_of_respond() -> None:
    assert Sampling.model_fields.keys() <= options_of("respond").keys()


def test_a_flag_that_is_not_given_leaves_the_default_to_the_model() -> None:
    flags = options_of("reward")
    assert [flags[field].default for field in ("backend", "allow_pickle", "truncate")] == [None, None, None]
    assert flags["backend"].choices == ("auto", "vllm", "transformers")
    assert RewardModel(model="m").backend == "auto"
