"""--ema: the average is what is evaluated and handed on, the raw weights are what is trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.support.runs import TEXT, computed, hrm, text_file, train


def test_who_gets_the_average(tmp_path: Path) -> None:
    data, held_out = text_file(tmp_path), text_file(tmp_path, rows=6, name="held_out.txt", seed=1)
    words = (*TEXT, "--steps", "6", "--eval-file", held_out, "--lr", "1e-2", "--save-every", "1", "--keep", "9")
    train(data, tmp_path / "raw", *words)
    train(data, tmp_path / "ema", *words, "--ema", "0.75")
    raw, ema = tmp_path / "raw", tmp_path / "ema"
    assert computed(raw) == computed(ema), "averaging does not change training"

    trail = [load_file(raw / "checkpoints" / f"step_{step}" / "model.safetensors") for step in range(1, 7)]
    last = ema / "checkpoints" / "step_6"
    average, final = load_file(last / "ema.safetensors"), load_file(ema / "model.safetensors")
    for name, value in load_file(last / "model.safetensors").items():
        np.testing.assert_array_equal(value, trail[-1][name], err_msg="a checkpoint holds the raw weights")
    moved = 0
    for name in average:
        np.testing.assert_array_equal(final[name], average[name])
        np.testing.assert_array_equal(load_file(ema / "best" / "model.safetensors")[name], average[name])
        first = load_file(ema / "checkpoints" / "step_1" / "ema.safetensors")[name].astype(np.float64)
        for weights in trail[1:]:
            first = 0.75 * first + 0.25 * weights[name]
        # Six float32 roundings of values below 10.
        np.testing.assert_allclose(average[name], first, rtol=0, atol=1e-5)
        moved += int(np.abs(average[name] - trail[-1][name]).max() > 1e-4)
    assert moved == len(average)

    figures = [json.loads((bundle / "metadata.json").read_text())["figures"] for bundle in (raw, ema)]
    assert figures[0]["loss"] != figures[1]["loss"]
    # The final weights of the averaged run, evaluated as raw weights of another run that does not move them.
    still = (*TEXT, "--steps", "1", "--eval-file", held_out, "--lr", "1e-30", "--weight-decay", "0")
    train(data, tmp_path / "still", *still, "--student-init", ema)
    assert json.loads((tmp_path / "still" / "metadata.json").read_text())["figures"] == figures[1]
    assert hrm("generate", ema, "--prompt", "a", "--max-new-tokens", "2").code == 0
