"""Bundles that version 0.1 wrote still load and resume.

`tests/fixtures/bundles_0_1` holds a text and a puzzle bundle at step 3 of 6, with the final weights of the whole run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.runs import hrm

OLDER = Path(__file__).resolve().parent.parent / "fixtures" / "bundles_0_1"
TOLERANCE = 1e-5
"""Absolute, on weights of order 1 after three AdamW updates of at most 1e-3: room for another CPU's rounding."""


@pytest.mark.parametrize("kind", ["text", "sudoku"])
def test_an_older_run_resumes_to_the_weights_of_the_uninterrupted_run(kind: str, tmp_path: Path) -> None:
    bundle = tmp_path / kind
    shutil.copytree(OLDER / kind, bundle)
    expected = load_file(bundle / "model.safetensors")
    (bundle / "model.safetensors").unlink()

    ran = hrm("train", "--bundle-dir", bundle, "--resume", "--dataset-file", OLDER / "data" / kind, "--threads", "1")

    assert ran.code == 0, ran.err
    assert "at step 6" in ran.out
    weights = load_file(bundle / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(weights[name], values, rtol=0, atol=TOLERANCE, err_msg=name)


def test_the_ledger_of_an_older_run_verifies_after_a_resume(tmp_path: Path) -> None:
    bundle = tmp_path / "text"
    shutil.copytree(OLDER / "text", bundle)
    assert hrm("ledger", "verify", bundle).code == 0
    ran = hrm("train", "--bundle-dir", bundle, "--resume", "--dataset-file", OLDER / "data" / "text", "--threads", "1")
    assert ran.code == 0, ran.err
    assert hrm("ledger", "verify", bundle).code == 0


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("text", ("generate", "--prompt", "the model", "--max-new-tokens", "4", "--temperature", "0")),
        ("sudoku", ("solve", "--file", OLDER / "data" / "sudoku", "--limit", "1")),
    ],
)
def test_an_older_bundle_answers(kind: str, words: tuple[object, ...], tmp_path: Path) -> None:
    shutil.copytree(OLDER / kind, tmp_path / kind)
    command, *options = words
    ran = hrm(command, tmp_path / kind, *options, "--device", "cpu")
    assert ran.code == 0, ran.err
    assert ran.out.strip()


def test_the_older_bundles_are_those_of_version_0_1() -> None:
    for kind in ("text", "sudoku"):
        assert json.loads((OLDER / kind / "metadata.json").read_text(encoding="utf-8"))["hrm_ray"].startswith("0.1")
