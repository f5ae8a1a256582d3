"""A block trainer is the ordinary loop: alone it trains what plain training does, among others every sample once."""

from __future__ import annotations

from pathlib import Path

import pytest

from hrm_ray.bundle.weights_file import read_tensors
from hrm_ray.independent.weights import AVERAGE
from hrm_ray.ledger.verify import violations
from hrm_ray.rundir import RunDir
from hrm_ray.train.strategies.single import AVERAGE as AVERAGE_FILE
from hrm_ray.train.strategies.single import WEIGHTS
from hrm_ray.types import StopReason
from tests.support.block_trainers import Block, plan_of, same, shared_of
from tests.support.runs import TEXT, text_file, train

CHUNKS = ("--dataset-chunk-size", "3", "--samples-per-block", "9")


def lines_file(folder: Path) -> Path:
    """Text in short rows, so that it has several chunks whose sequences no batch size divides."""
    path = text_file(folder, rows=40)
    words = path.read_text(encoding="utf-8")
    path.write_text("\n".join(words[at : at + 37] for at in range(0, len(words), 37)), encoding="utf-8")
    return path


@pytest.mark.parametrize("merge_after", [1, 3])
def test_alone_it_is_plain_training_to_the_bit(tmp_path: Path, merge_after: int) -> None:
    """With no outer step: whole weights, moving average included, however late the merges come."""
    data = lines_file(tmp_path)
    words = (*TEXT, *CHUNKS, "--epochs", 1, "--ema", 0.9, "--dropout-rate", 0.1, "--gradient-accumulation-steps", 2)
    words = (*words, "--batch-size", 2, "--lr", 1e-2)
    train(data, tmp_path / "plain", *words)
    plain = RunDir(tmp_path / "plain").newest_checkpoint()
    assert plain is not None
    block = Block(plan_of(data, tmp_path / "block", *words), report_updates=3, whole_weights=True)
    with block.trainer() as trainer:
        ended, turns = trainer.join(), 0
        while ended is None:
            ended, turns = trainer.turn(), turns + 1
            if turns % merge_after == 0:
                block.merge()
    assert ended is StopReason.FINISHED
    expected = shared_of(read_tensors(plain / WEIGHTS))
    expected |= {f"{AVERAGE}{name}": tensor for name, tensor in read_tensors(plain / AVERAGE_FILE).items()}
    assert same(block.weights(), expected)
    assert len(block.anchors) > 3
    assert list(violations(block.ledger)) == []
