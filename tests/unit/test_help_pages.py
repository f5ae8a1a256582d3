"""Help pages: one form for all commands, the options that matter first, types, no name broken; and docs/options.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hrm_ray.cli import arch_summary, train
from hrm_ray.settings import document
from hrm_ray.settings.options import options
from tests.support.runs import hrm

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    *("", "train", "train-actv1", "arch-summary", "generate", "solve", "plot", "data", "data inspect", "data build"),
    *("data build sudoku", "data build maze", "data build arc", "data build text"),
    *(
        "expert",
        "expert list",
        "expert put",
        "ledger",
        "ledger show",
        "ledger verify",
        "merge",
        "doctor",
        "submit",
        "stop",
    ),
)


def help_of(words: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    ran = hrm(*words.split())
    assert ran.code == 0, ran.err
    return ran.out


@pytest.mark.parametrize("columns", [20, 80, 200])
def test_all_pages_have_one_form(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COMMANDS:
        out = help_of(f"{name} --help", columns, monkeypatch)
        assert out.startswith(f"Usage: hrm-ray{f' {name}' if name else ''} ")
        assert not re.search(r"[{}<>╭│]", out), name
        assert "VALUE" not in out
        if columns >= 80:
            assert max(map(len, out.partition("Examples:")[0].splitlines())) <= min(columns, 100)


def test_train_help_shows_twenty_options_and_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    out = help_of("train --help", 80, monkeypatch)
    shown = re.findall(r"^  (--[a-z-]+)", out, re.MULTILINE)
    own = ["--config", "--dry-run", "--optimize", "--help", "--help-all"]
    assert shown == [*(options()[key].flag for key in train.COMMON), *own]
    assert len(train.COMMON) == 20
    assert "--steps INT" in out and "FLOAT" in out and "--bundle-dir, --save-dir, --output-dir PATH" in out
    assert "Examples:\n  hrm-ray " in out


def test_help_all_shows_every_option_by_section(monkeypatch: pytest.MonkeyPatch) -> None:
    out = help_of("train --help-all", 80, monkeypatch)
    words = set(re.split(r"[\s,/]+", out))
    for option in options().values():
        assert option.flag in words
        assert set(option.traits.aliases) <= words
        assert not option.is_switch or option.off_flag in words
    flowing = " ".join(out.split())
    assert "[default: 0.95]" in flowing and "[default: --packing]" in flowing and "\nOptimizer:\n" in out


def test_arch_summary_shows_the_options_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = re.findall(r"^  (--[a-z0-9-]+)", help_of("arch-summary --help-all", 80, monkeypatch), re.MULTILINE)
    taken = [option.flag for option in options().values() if arch_summary.COMMAND.takes(option)]
    assert shown == [*arch_summary.COMMAND.own_names, *taken]


def test_the_page_of_options_is_what_the_settings_say() -> None:
    written = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert written == document.page(), "run: python -m hrm_ray.settings.document > docs/options.md"
