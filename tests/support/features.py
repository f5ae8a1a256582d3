"""The features that can be combined, each as a user would type it.

One job: the literal table, and the words of a combination. What a combination must do is in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.support.fail_at import FailAt

OFF = {"--use-moe": "--no-moe", "--amp": "--no-amp", "--gradient-checkpointing": "--no-gradient-checkpointing"}
"""Switches that are on unless said otherwise; a combination has them off unless it asks for them."""


@dataclass(frozen=True)
class Feature:
    """Words that turn it on; `starts` says that it starts from a trained bundle, `shapes` that it decides which
    bundles fit, `puzzles` whether it is for puzzles too."""

    words: tuple[str, ...] = ()
    starts: bool = False
    puzzles: bool = True
    failure: FailAt | None = None
    small_scores: bool = False
    shapes: bool = False


def _peft(method: str, *more: str) -> Feature:
    return Feature(("--use-peft", "--peft-method", method, *more), starts=True)


FEATURES: dict[str, Feature] = {
    "checkpointing": Feature(("--gradient-checkpointing",)),
    "amp-bf16": Feature(("--amp", "--amp-dtype", "bf16")),
    "amp-fp16": Feature(("--amp", "--amp-dtype", "fp16")),
    "weights-bf16": Feature(("--model-dtype", "bf16")),
    "weights-fp16": Feature(("--model-dtype", "fp16")),
    "8bit-optimizer": Feature(("--use-8bit-optimizer",)),
    "int8": _peft("lora", "--load-in-8bit"),
    "nf4": _peft("lora", "--load-in-4bit"),
    "lora": _peft("lora"),
    "adalora": _peft("adalora"),
    "ia3": _peft("ia3"),
    "loha": _peft("loha"),
    "lokr": _peft("lokr"),
    "chunked": Feature(("--use-chunked-training", "--chunk-size", "8"), puzzles=False),
    "chunked-exact": Feature(
        ("--use-chunked-training", "--chunk-size", "8", "--chunk-gradients", "exact"), puzzles=False
    ),
    "window": Feature(("--window-size", "7"), puzzles=False, shapes=True),
    "moe": Feature(("--use-moe", "--num-experts", "4"), shapes=True),
    "expert": Feature(("--use-moe", "--num-experts", "4", "--expert-id", "one", "--expert-index", "1"), starts=True),
    "large-vocabulary": Feature(("--vocab-size", "400"), small_scores=True, puzzles=False, shapes=True),
    "out-of-memory": Feature(failure=FailAt(0, 3, fits=2)),
    "accumulation": Feature(("--gradient-accumulation-steps", "2")),
    "adaptive-lr": Feature(("--adaptive-lr-config", "ADAPTIVE")),
    "dropout": Feature(("--dropout-rate", "0.1")),
    "plain-ffn": Feature(("--no-swiglu", "--activation", "gelu", "--no-rmsnorm"), shapes=True),
    "all-updates": Feature(("--bp-steps", "6"), shapes=True),
    "adam-atan2": Feature(("--optimizer", "adam-atan2")),
    "ema": Feature(("--ema", "0.9")),
    "transformer": Feature(("--arch", "transformer"), puzzles=False, shapes=True),
}
"""By name. `ADAPTIVE` stands for a file of settings."""


def base_of(names: tuple[str, ...]) -> tuple[str, ...]:
    """The features that a bundle to start from must share with a combination."""
    return tuple("moe" if name == "expert" else name for name in names if FEATURES[name].shapes or name == "expert")


def words_of(names: tuple[str, ...]) -> list[str]:
    """The words of all named features together; of an option said twice the later counts."""
    said: dict[str, list[str]] = {}
    for name in names:
        words = FEATURES[name].words
        for place, word in enumerate(words):
            if word.startswith("--"):
                has_value = place + 1 < len(words) and not words[place + 1].startswith("--")
                said[word] = [words[place + 1]] if has_value else []
    off = [switch for on, switch in OFF.items() if on not in said]
    return [*(part for word, value in said.items() for part in (word, *value)), *off]
