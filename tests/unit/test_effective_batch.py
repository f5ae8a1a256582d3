"""--effective-batch-size chooses the accumulation, is refused where it is no product, and stays in a resumed run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.errors import SettingsError
from hrm_ray.launch.fallbacks import without_effect_on
from hrm_ray.settings.load import load_settings
from hrm_ray.settings.resolve import with_effective_batch
from hrm_ray.settings.tree import to_dotted
from tests.support.runs import TEXT, hrm, records, refused, text_file


def test_a_batch_size_for_each_independent_trainer() -> None:
    words: dict[str, str | bool] = {"--parallel-independent": True, "--batch-size": "8,16"}
    settings = load_settings(words)
    assert settings.optimizer.batch_size == 16 and settings.cluster.batch_size_of_trainers == (8, 16)
    again = load_settings({"--batch-size": "4"}, base=to_dotted(settings))
    assert again.optimizer.batch_size == 4 and again.cluster.batch_size_of_trainers == ()
    kept = load_settings({}, base=to_dotted(settings))
    assert kept.optimizer.batch_size == 16 and kept.cluster.batch_size_of_trainers == (8, 16)
    for wrong in ("16,x", "16,0"):
        with pytest.raises(SettingsError, match=wrong):
            load_settings({**words, "--batch-size": wrong})
    with pytest.raises(SettingsError, match="one batch size"):
        load_settings({"--batch-size": "8,16"})


def test_the_batch_sizes_are_as_many_as_the_trainers(tmp_path: Path) -> None:
    words = ("--dataset-file", text_file(tmp_path), "--bundle-dir", tmp_path / "b", "--parallel-independent")
    refused(2, "train", *words, "--world-size", 3, "--batch-size", "4,2", naming=("--batch-size 4,2", 2, 3))
    together = [word for word in words if word != "--parallel-independent"]
    said = refused(2, "train", *together, "--batch-size", "4,2", naming=("--batch-size 4,2 with",))
    assert "trainer-batch-sizes" not in said
    refused(2, "train", *together, "--trainer-batch-sizes", "4,2", naming=("--trainer-batch-sizes 4,2 with",))
    assert not (tmp_path / "b").exists()


def test_a_share_of_no_gpu_is_said_to_have_no_effect() -> None:
    given = load_settings({"--parallel-independent": True, "--gpu-share": "0.5"})
    assert [noted.option for noted in without_effect_on(given, "cpu")] == ["--gpu-share 0.5"]
    assert without_effect_on(given, "cuda") == []


def shape(words: dict[str, str | bool], world_size: int = 1) -> tuple[int, int]:
    chosen = with_effective_batch(load_settings(words), world_size).optimizer
    return chosen.batch_size, chosen.gradient_accumulation_steps


@pytest.mark.parametrize(
    ("words", "world_size", "expected"),
    [
        ({"--batch-size": "4"}, 1, (4, 8)),
        ({"--batch-size": "4"}, 2, (4, 4)),
        ({}, 1, (8, 4)),
        ({"--gradient-accumulation-steps": "4"}, 1, (8, 4)),
        ({"--gradient-accumulation-steps": "16"}, 1, (2, 16)),
        ({"--gradient-accumulation-steps": "2", "--batch-size": "8"}, 2, (8, 2)),
    ],
)
def test_the_accumulation(words: dict[str, str | bool], world_size: int, expected: tuple[int, int]) -> None:
    assert shape({"--effective-batch-size": "32", **words}, world_size) == expected


@given(st.integers(1, 300), st.integers(1, 40) | st.none(), st.integers(1, 9))
def test_the_product_is_what_was_asked_for(wanted: int, batch_size: int | None, world_size: int) -> None:
    words: dict[str, str | bool] = {"--effective-batch-size": str(wanted)}
    if batch_size is not None:
        words["--batch-size"] = str(batch_size)
    try:
        batch, accumulation = shape(words, world_size)
    except SettingsError as error:
        assert wanted % ((batch_size or 1) * world_size) != 0
        assert len(str(error)) < 300
    else:
        assert batch * accumulation * world_size == wanted and batch == (batch_size or batch) and batch >= 1


@pytest.mark.parametrize(
    ("words", "world_size", "message"),
    [
        ({"--batch-size": "8"}, 1, "--effective-batch-size 30: is no multiple of --batch-size 8. Give 24 or 32, or"),
        ({"--batch-size": "8"}, 2, "is no multiple of --batch-size 8 x 2 workers = 16. Give 16 or 32"),
        ({"--batch-size": "64"}, 1, "Give 64, or another --batch-size"),
        ({"--gradient-accumulation-steps": "4"}, 1, "--batch-size 8 x 4 is 32. Give one of the two"),
    ],
)
def test_what_is_no_product(words: dict[str, str | bool], world_size: int, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        shape({"--effective-batch-size": "30", **words}, world_size)
    assert message in str(caught.value)


def test_the_later_of_the_two_options_counts(tmp_path: Path) -> None:
    """On the command line over the file, and in a resumed run over what is stored."""
    config = tmp_path / "run.yaml"
    config.write_text("optimizer: {gradient_accumulation_steps: 2, batch_size: 4}\n", encoding="utf-8")
    settings = load_settings({"--effective-batch-size": "32"}, config)
    assert with_effective_batch(settings, 1).optimizer.gradient_accumulation_steps == 8
    stored = to_dotted(with_effective_batch(settings, 1))
    assert with_effective_batch(load_settings({}, base=stored), 2).optimizer.gradient_accumulation_steps == 4
    again = load_settings({"--gradient-accumulation-steps": "3"}, base=stored).optimizer
    assert (again.effective_batch_size, again.gradient_accumulation_steps) == (None, 3)


def test_a_run_shows_it_and_keeps_it_when_it_is_resumed(tmp_path: Path) -> None:
    """With another micro-batch the resumed run has the same effective batch, and so the same losses."""
    words = ("train", "--dataset-file", text_file(tmp_path), *TEXT, "--no-amp", "--effective-batch-size", "8")
    assert "batch   4 x 2 accumulated x 1 worker(s) = 8" in hrm(*words, "--dry-run").out
    refused(2, *words[:-1], "9", naming=("--effective-batch-size 9", "Give 8 or 12"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert hrm(*words, "--bundle-dir", whole, "--steps", "4", "--lr-schedule", "constant").code == 0
    assert hrm(*words, "--bundle-dir", parts, "--steps", "2", "--lr-schedule", "constant").code == 0
    ran = hrm("train", "--bundle-dir", parts, "--resume", "--steps", "4", "--batch-size", "2")
    assert ran.code == 0 and "batch   2 x 4 accumulated" in ran.out, ran.err
    losses = [[record["loss"] for record in records(bundle)] for bundle in (whole, parts)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
