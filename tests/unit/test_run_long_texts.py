"""Windows and chunks through the command line: what is trained, said, refused, resumed and used again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.runs import TEXT, computed, hrm, records, refused, stopping_at, text_file, train

LONG = (*TEXT, "--no-amp", "--steps", "8", "--save-every", "3")
EVALUATED = ("--eval-every", "4", "--eval-batches", "1", "--eval-file")


def chunked(size: int, *more: object) -> tuple[object, ...]:
    return ("--use-chunked-training", "--chunk-size", size, *more)


def said(bundle: Path) -> list[str]:
    return [str(record["message"]) for record in records(bundle, "event") if record["level"] == "WARNING"]


def test_exact_chunks_train_as_whole_rows_do(tmp_path: Path) -> None:
    """The same losses step for step, held-out ones too; float32 sums in another order, eight updates long."""
    data = text_file(tmp_path)
    train(data, tmp_path / "whole", *LONG, *EVALUATED, data)
    train(data, tmp_path / "parts", *LONG, *chunked(7, "--chunk-gradients", "exact"), *EVALUATED, data)
    for kind, name in (("train", "loss"), ("train", "grad_norm"), ("eval", "loss"), ("eval", "adaptive_loss")):
        want = [record[name] for record in computed(tmp_path / "whole", kind)]
        got = [record[name] for record in computed(tmp_path / "parts", kind)]
        assert got == pytest.approx(want, rel=1e-4) and len(want) >= 2
    assert not any("--use-chunked-training" in note for note in said(tmp_path / "parts"))


def test_truncated_chunks_are_said_once_and_learn(tmp_path: Path) -> None:
    data = text_file(tmp_path)
    train(data, tmp_path / "run", *LONG, *chunked(5), "--steps", "30", "--lr", "1e-2")
    assert len([note for note in said(tmp_path / "run") if "gradients stop at the borders" in note]) == 1
    losses = [record["loss"] for record in records(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.5
    train(data, tmp_path / "whole", *LONG, "--steps", "1", "--lr", "1e-2")
    first, whole = records(tmp_path / "run")[0], records(tmp_path / "whole")[0]
    assert first["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert first["grad_norm"] != pytest.approx(whole["grad_norm"], rel=1e-4)


def test_one_chunk_is_normal_training(tmp_path: Path) -> None:
    """It is noted, since it has no effect."""
    data = text_file(tmp_path)
    train(data, tmp_path / "plain", *LONG, "--steps", "2")
    train(data, tmp_path / "one", *LONG, "--steps", "2", *chunked(16))
    assert computed(tmp_path / "one") == computed(tmp_path / "plain")
    noted = [record["message"] for record in records(tmp_path / "one", "event") if "no effect" in record["message"]]
    assert noted == [
        "no effect here: --use-chunked-training and --chunk-size 16 (a row has no more tokens than a chunk)"
    ]


@pytest.mark.parametrize(
    "words",
    [
        chunked(5),
        chunked(6, "--chunk-gradients", "exact", "--window-size", "4", "--dropout-rate", "0.2"),
        (*chunked(5, "--chunk-gradients", "exact"), "--arch", "transformer", "--gradient-accumulation-steps", "2"),
    ],
)
def test_stopped_and_resumed(tmp_path: Path, words: tuple[object, ...]) -> None:
    data = text_file(tmp_path)
    train(data, tmp_path / "whole", *LONG, *words)
    with stopping_at(4):
        train(data, tmp_path / "parts", *LONG, *words)
    train(data, tmp_path / "parts", *LONG, *words, "--resume")
    assert computed(tmp_path / "parts") == computed(tmp_path / "whole")


def test_a_window_is_part_of_the_model(tmp_path: Path) -> None:
    data = text_file(tmp_path)
    train(data, tmp_path / "run", *LONG, "--window-size", "4")
    assert json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["window_size"] == 4
    train(data, tmp_path / "free", *LONG)
    window, free = ([record["loss"] for record in records(tmp_path / name)] for name in ("run", "free"))
    assert window[0] == pytest.approx(free[0], rel=0.05) and window[1:] != free[1:]
    made = hrm("generate", tmp_path / "run", "--prompt", "abc", "--max-new-tokens", "24", "--seed", "1")
    assert made.code == 0, made.err


def test_flash_attention_that_is_not_there_is_said_once(tmp_path: Path) -> None:
    data = text_file(tmp_path)
    train(data, tmp_path / "run", *LONG, "--use-flash-attn", "--device", "cpu")
    assert [note for note in said(tmp_path / "run") if "--use-flash-attn" in note] == [
        "--use-flash-attn: it needs a CUDA device, and this is cpu; PyTorch's own kernels are used instead, "
        "with the same results."
    ]
    for words in (("--no-use-flash-attn",), ()):
        train(data, tmp_path / f"quiet{len(words)}", *LONG, *words)
        assert said(tmp_path / f"quiet{len(words)}") == []
    refused(
        3,
        "train",
        "--dataset-file",
        data,
        *LONG,
        "--use-flash-attn",
        "--device",
        "cpu",
        "--strict",
        naming=("--use-flash-attn", "CUDA"),
    )


def test_offload_of_what_is_in_host_memory_is_said(tmp_path: Path) -> None:
    data = text_file(tmp_path)
    words = (*LONG, *chunked(5, "--cpu-offload"))
    train(data, tmp_path / "run", *words)
    events = [record["message"] for record in records(tmp_path / "run", "event")]
    assert any("no effect here: --cpu-offload (on the CPU" in event for event in events)
    refused(2, "train", "--dataset-file", data, *words, "--strict", naming=("--cpu-offload",))
