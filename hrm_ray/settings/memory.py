"""Settings of memory and precision: checkpointing, mixed precision, chunks, quantisation and offloading."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import field_validator

from hrm_ray.settings.base import Section, option, refusal, switch_aliases
from hrm_ray.settings.needs import (
    AMP,
    CHUNKS,
    FLOAT32_WEIGHTS,
    MOMENTS_TO_OFFLOAD,
    SEVERAL_CHUNKS,
)
from hrm_ray.settings.size import bytes_of

AmpDtype: TypeAlias = Literal["auto", "bf16", "fp16"]
ModelDtype: TypeAlias = Literal["fp32", "fp16", "bf16"]


class MemorySettings(Section):
    """Trade-offs between memory, time and precision."""

    gradient_checkpointing: bool | None = option(None, "free", unset="off where the memory suffices without it")
    """Activation checkpointing: keep each block's input only and recompute the block in the backward pass."""
    amp: bool | None = option(
        None,
        "free",
        aliases=switch_aliases("--use-mixed-precision", "--mixed-precision"),
        legacy_default=False,
        unset="on for GPUs, off for the CPU",
    )
    """Automatic mixed precision: matrix products in a 16-bit type, sums and normalisation in float32."""
    amp_dtype: AmpDtype = option("auto", "free", needs=(AMP,))
    """The 16-bit type of --amp: bf16, fp16 (with a loss scaler), or auto (bf16 if the device has it, else fp16)."""
    model_dtype: ModelDtype = option("fp32", "fixed")
    """Type of weights, activations and the gradients of one pass. Gradients of several passes or workers are added in
    float32; updates of 16-bit weights are rounded stochastically. Under zero1, zero2, zero3, which take bf16, float32
    copies are updated, divided among the workers and saved in checkpoints."""
    activations: Literal["fp32", "bf16"] | None = option(
        None,
        "free",
        needs=(FLOAT32_WEIGHTS,),
        legacy_default="fp32",
        unset="bf16 with --amp on a GPU that computes in it",
    )
    """Type of states, residuals and saved activations beside float32 weights. Norms, losses and halting scores are
    computed in float32."""
    use_chunked_training: bool = option(False, "free", needs=(SEVERAL_CHUNKS,))
    """Train a long text chunk by chunk: activation memory grows with the chunk, not with the sequence."""
    chunk_size: int = option(2048, "free", ge=1, needs=(CHUNKS, SEVERAL_CHUNKS))
    """Tokens in a chunk of --use-chunked-training."""
    chunk_gradients: Literal["exact", "truncated"] = option("truncated", "free", needs=(CHUNKS, SEVERAL_CHUNKS))
    """truncated: gradients stop at chunk borders; exact: the whole sequence's gradient, for one more forward pass of
    each chunk."""
    cpu_offload: bool = option(False, "free", needs=(CHUNKS, SEVERAL_CHUNKS))
    """Keep the states, keys and values of the other chunks in host memory (CUDA only)."""
    load_in_8bit: bool = option(False, "fixed")
    """Quantise the frozen weights of linear layers to int8, a quarter of the memory; needs --use-peft."""
    load_in_4bit: bool = option(False, "fixed")
    """Quantise the frozen weights of linear layers to 4-bit NormalFloat, a seventh of the memory; needs --use-peft."""
    optimizer_offload: bool = option(False, "free", needs=(MOMENTS_TO_OFFLOAD,))
    """Keep the optimizer state in host memory; during an update one parameter's state at a time is on the device."""
    keep_freed_memory: bool | None = option(None, "free", unset="on if three times the needed memory is free")
    """On the CPU: keep freed memory for the next tensors (faster, up to three times the memory), or give it back."""
    memory_budget: str | None = option(None, "free", unset="what the machine or the device has")
    """Most memory that each worker may take, as 900MB, 1.5GB or 8GiB: of a GPU, or on a CPU of the whole process (about
    0.4 GB without any model). What needs more is refused, or runs out of memory as if no more were there (on a CPU on
    Linux only)."""

    @field_validator("memory_budget")
    @classmethod
    def _size(cls, value: str | None) -> str | None:
        if value is not None and bytes_of(value) is None:
            raise refusal("is not a size of memory", "Give a number with its unit, such as 900MB, 1.5GB or 8GiB")
        return value

    @property
    def budget_bytes(self) -> int | None:
        """The bytes of --memory-budget."""
        return None if self.memory_budget is None else bytes_of(self.memory_budget)
