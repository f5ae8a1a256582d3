"""The words of a command line are split without losing or inventing any."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.cli.flat_command import FlatCommand
from hrm_ray.settings.load import load_settings
from tests.support.said import to_options

COMMAND = FlatCommand("test", "about", {"--config FILE": "a file", "--dry-run": "a switch"})


@pytest.mark.parametrize(
    ("words", "options", "own"),
    [
        (["--lr", "1e-3", "--packing"], {"--lr": "1e-3", "--packing": True}, {}),
        (["--lr=1e-3", "--no-packing", "--keep", "2"], {"--lr": "1e-3", "--no-packing": True, "--keep": "2"}, {}),
        (["--no-rope", "--d-model", "64"], {"--no-rope": True, "--d-model": "64"}, {}),
        (["--brain-name", "a=b", "--packing=no"], {"--brain-name": "a=b", "--packing": "no"}, {}),
        (["--weight-decay", "-1"], {"--weight-decay": "-1"}, {}),
        (["--lr", "--keep", "2"], {"--lr": True, "--keep": "2"}, {}),
        (["--config", "a.yaml", "--dry-run", "--lr"], {"--lr": True}, {"--config": "a.yaml", "--dry-run": True}),
        (["--hiden-size", "64", "--keep", "2"], {"--hiden-size": "64", "--keep": "2"}, {}),
        (["--dryrun", "--keep", "2"], {"--dryrun": True, "--keep": "2"}, {}),
        (["--lr", "1", "--lr", "1"], {"--lr": "1"}, {}),
        (["--streaming", "True", "--keep", "2"], {"--streaming": "True", "--keep": "2"}, {}),
        (["--no-moe", "true", "--amp=false"], {"--no-moe": "true", "--amp": "false"}, {}),
    ],
)
def test_words_become_options(words: list[str], options: dict[str, str | bool], own: dict[str, str | bool]) -> None:
    found = COMMAND.parse(words)
    assert (found.options, found.own, found.faults) == (options, own, [])


@pytest.mark.parametrize(
    ("words", "value", "reason"),
    [
        (["stray", "--lr", "1"], "stray", "belongs to no option"),
        (["--packing", "nope"], "nope", "belongs to no option"),
        (["--dryrun", "stray"], "stray", "belongs to no option"),
        (["--config"], "--config", "needs a value"),
        (["--config="], "--config", "needs a value"),
        (["--dry-run=yes"], "--dry-run=yes", "takes no value"),
    ],
)
def test_what_does_not_fit_is_a_fault(words: list[str], value: str, reason: str) -> None:
    (fault,) = COMMAND.parse(words).faults
    assert fault.value == value and reason in fault.reason


def test_of_an_option_given_again_the_last_value_counts() -> None:
    words = ["--lr", "1", "--packing", "--keep", "2", "--packing=no", "--lr", "3", "--config", "a", "--config", "b"]
    found = COMMAND.parse(words)
    assert list(found.options.items()) == [("--keep", "2"), ("--packing", "no"), ("--lr", "3")]
    assert found.own == {"--config": "b"} and not found.faults
    assert [(again.option, again.reason) for again in found.overridden] == [
        ("--packing", "overridden by --packing no"),
        ("--lr 1", "overridden by --lr 3"),
        ("--config a", "overridden by --config b"),
    ]


WORDS = st.lists(
    st.sampled_from(
        [
            *(("--steps", str(n)) for n in (1, 2, 3)),
            *(
                ("--lr", "0.1"),
                ("--learning-rate", "0.2"),
                ("--lr=0.3",),
                ("--amp",),
                ("--no-amp",),
                ("--amp", "false"),
            ),
            *(("--use-mixed-precision",), ("--no-use-mixed-precision", "TRUE"), ("--keep", "2")),
        ]
    ),
    max_size=12,
)


@given(WORDS)
def test_however_often_options_are_given_the_last_value_counts(given_words: list[tuple[str, ...]]) -> None:
    """Each value that a later one replaced is noted, and nothing else."""
    parsed = COMMAND.parse([word for words in given_words for word in words])
    settings = load_settings(parsed.options, found=parsed.faults, given_again=parsed.overridden)
    one_by_one = [load_settings(COMMAND.parse(words).options) for words in given_words]
    last = {key: each.leaf(key) for each in one_by_one for key in each.given}
    assert {key: settings.leaf(key) for key in settings.given} == last
    values: dict[str, list[object]] = {
        key: [each.leaf(key) for each in one_by_one if key in each.given] for key in last
    }
    changed = any(len(set(map(str, each))) > 1 for each in values.values())
    assert bool(settings.overridden) >= changed


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "--hidden-size": st.sampled_from(["64", "128"]),
            "--weight-decay": st.floats(0, 10).map(str),
            "--brain-name": st.text("abc-=_ ", min_size=1).filter(lambda text: text.strip() and text[-1] not in ". "),
            "--packing": st.booleans(),
            "--device": st.sampled_from(["cpu", "cuda"]),
        },
    )
)
def test_what_settings_say_as_words_gives_the_settings(said: dict[str, str | bool]) -> None:
    settings = load_settings(said)
    words: list[str] = []
    for name, value in to_options(settings).items():
        if isinstance(value, bool):
            words.append(name if value else f"--no-{name[2:]}")
        else:
            words.append(f"{name}={value}")
    found = COMMAND.parse(words)
    assert not found.faults and {name for name in found.options} <= set(words) | {
        word.partition("=")[0] for word in words
    }
    again = {key: value for key, value in found.options.items() if key.removeprefix("--") in _names(said)}
    assert load_settings(again) == settings


def _names(said: dict[str, str | bool]) -> set[str]:
    return {name[2:] for name in said} | {f"no-{name[2:]}" for name in said}
