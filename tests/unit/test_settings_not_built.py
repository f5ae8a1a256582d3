"""What is planned and not built yet is known by name, says what serves today, and never shows a value."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.main import get_command

from hrm_ray.cli.main import app
from hrm_ray.settings.not_built import NOT_BUILT, SWITCHES
from hrm_ray.settings.options import spellings
from tests.support.runs import TEXT, hrm, refused, text_file

SECRET = "sv=2020&sig=S3CR3T"


def test_no_row_names_what_is_there() -> None:
    """A feature that is built has deleted its row."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for name in NOT_BUILT:
        option, _, value = name.partition(" ")
        if option == "hrm-ray":
            assert value not in commands, name
        elif value:
            assert value not in spellings()[option].option.choices, name
        else:
            assert option not in spellings(), name
    assert set(NOT_BUILT) >= SWITCHES


@pytest.mark.parametrize("name", NOT_BUILT)
def test_the_message_says_what_to_use_today(name: str, tmp_path: Path) -> None:
    first, _, value = name.partition(" ")
    if first == "hrm-ray":
        refused(2, value, "SPACE.yaml", naming=(name, "is not built yet", "oday"))
        return
    words = [first, value] if value else [first] if first in SWITCHES else [first, SECRET]
    command = ("train", "--dataset-file", text_file(tmp_path), "--bundle-dir", tmp_path / "b", *TEXT)
    message = refused(2, *command, *(word for word in words if word), naming=(name, "is not built yet", "oday"))
    assert "S3CR3T" not in message and len(message) < 300 and not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("--azure-sas-token", SECRET),
        (f"--azure-sas-token={SECRET}",),
        ("--azure-sas-token", f"-{SECRET}"),
        ("--azure-sas-token", SECRET, "--azure-sas-token", f"{SECRET}2", "--strict"),
        ("--azure-sas-tokn", SECRET),
        ("--azure-sas-tokn", SECRET, "--azure-sas-tokn", f"{SECRET}2", "--strict"),
        ("-azure-sas-token", SECRET),
        ("--azure_sas_token", SECRET),
        ("--config", "FILE"),
    ],
)
def test_no_secret_is_shown(words: tuple[str, ...], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"azure_sas_token: '{SECRET}'\nrun.azure_sas_tokn: '{SECRET}'\n")
    ran = hrm("train", "--dataset-file", text_file(tmp_path), *(str(config) if w == "FILE" else w for w in words))
    assert ran.code == 2 and "azure" in ran.err and "S3CR3T" not in ran.out + ran.err


def test_a_device_of_a_command_that_is_planned() -> None:
    for command in (("generate", "b", "--prompt", "x"), ("solve", "b")):
        refused(2, *command, "--device", "dml", naming=("--device dml", "is not built yet", "--device cpu today"))
        refused(2, *command, "--device", "gpu", naming=("--device", "'gpu' is not one of auto, cpu, cuda"))


def test_no_zero_stage_is_the_default(tmp_path: Path) -> None:
    ran = hrm("train", "--dataset-file", text_file(tmp_path), *TEXT, "--zero-stage", "none", "--dry-run")
    assert ran.code == 0 and "strategy single" in ran.out
