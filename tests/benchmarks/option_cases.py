"""The options that bench_options.py compares, each as a user would type it."""

from __future__ import annotations

from dataclasses import dataclass

PLAIN = ("--no-gradient-checkpointing", "--no-amp", "--no-moe")
"""The base of every case: float32, no checkpointing, dense."""


@dataclass(frozen=True)
class OptionCase:
    """One row of the table: options on top of PLAIN; `starts` says whether it starts from the trained base bundle."""

    name: str
    words: tuple[str, ...]
    starts: bool = False
    needs_gpu: bool = False


_CHECKPOINTS, _AMP, _MOE = ("--gradient-checkpointing",), ("--amp",), ("--use-moe",)
_PEFT = ("--use-peft",)
CASES: tuple[OptionCase, ...] = (
    OptionCase("plain", ()),
    OptionCase("gradient checkpointing", _CHECKPOINTS),
    OptionCase("amp bf16", _AMP),
    OptionCase("amp fp16", (*_AMP, "--amp-dtype", "fp16")),
    OptionCase("weights bf16", ("--model-dtype", "bf16")),
    OptionCase("8-bit optimizer", ("--use-8bit-optimizer",)),
    OptionCase("optimizer offload", ("--optimizer-offload",), needs_gpu=True),
    OptionCase("window 64", ("--window-size", "64")),
    OptionCase("chunked, truncated", ("--use-chunked-training", "--chunk-size", "64")),
    OptionCase("chunked, exact", ("--use-chunked-training", "--chunk-size", "64", "--chunk-gradients", "exact")),
    OptionCase("MoE 8 top-2", _MOE),
    OptionCase("accumulation 8 x 2", ("--batch-size", "2", "--gradient-accumulation-steps", "8")),
    *(OptionCase(f"peft {method}", (*_PEFT, "--peft-method", method), starts=True)
      for method in ("lora", "adalora", "ia3", "loha", "lokr")),
    OptionCase("int8 base + lora", (*_PEFT, "--load-in-8bit"), starts=True),
    OptionCase("nf4 base + lora", (*_PEFT, "--load-in-4bit"), starts=True),
    OptionCase("defaults (checkpointing, amp, MoE)", (*_CHECKPOINTS, *_AMP, *_MOE)),
    OptionCase("checkpointing, amp, 8-bit optimizer", (*_CHECKPOINTS, *_AMP, "--use-8bit-optimizer")),
    OptionCase("the same, chunked", (*_CHECKPOINTS, *_AMP, "--use-8bit-optimizer", "--use-chunked-training",
                                     "--chunk-size", "64")),
    OptionCase("the same, weights bf16", (*_CHECKPOINTS, "--model-dtype", "bf16", "--use-8bit-optimizer",
                                          "--use-chunked-training", "--chunk-size", "64")),
    OptionCase("nf4 base + lora, checkpointing, amp", (*_PEFT, "--load-in-4bit", *_CHECKPOINTS, *_AMP), starts=True),
)  # fmt: skip
"""Each option alone, then useful combinations."""
