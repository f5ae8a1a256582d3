"""Settings of memory and precision: what is kept, recomputed, narrowed or moved.

One job: the leaves of section `memory`. What they do is in `hrm_ray.model.transforms` and `hrm_ray.train`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field

from hrm_ray.settings.base import Section

AmpDtype: TypeAlias = Literal["auto", "bf16", "fp16"]
ModelDtype: TypeAlias = Literal["fp32", "fp16", "bf16"]
ChunkGradients: TypeAlias = Literal["exact", "truncated"]


class MemorySettings(Section):
    """How memory is traded for time and precision."""

    gradient_checkpointing: bool = True
    """Keep each block's input only and compute its inside again in the backward pass; same gradients."""
    amp: bool = True
    """Automatic mixed precision: matrix products in a 16-bit type, everything that sums or normalises in float32."""
    amp_dtype: AmpDtype = "auto"
    """The 16-bit type of --amp: bf16, fp16 (with a loss scaler), or auto: bf16 where the device has it, else fp16."""
    model_dtype: ModelDtype = "fp32"
    """Type of weights, activations and the gradients of a pass. The gradients of several passes or workers are added in
    float32; the update of a narrow weight is rounded stochastically."""
    use_chunked_training: bool = False
    """Train a long text a chunk at a time: memory for activations follows the chunk, not the sequence."""
    chunk_size: int = Field(default=2048, ge=1)
    """Tokens in a chunk of --use-chunked-training."""
    chunk_gradients: ChunkGradients = "truncated"
    """truncated: no gradient flows into earlier chunks; exact: the whole sequence's gradient, at the price of computing
    each chunk once more."""
    cpu_offload: bool = False
    """Let what chunked training keeps between chunks (states, keys and values) rest in host memory."""
    load_in_8bit: bool = False
    """Hold the frozen weights of linear layers in int8, a quarter of the bytes; needs --use-peft."""
    load_in_4bit: bool = False
    """Hold the frozen weights of linear layers in NormalFloat of 4 bits, a seventh of the bytes; needs --use-peft."""
    optimizer_offload: bool = False
    """Keep the optimizer's state in host memory; an update has one parameter's state on the device at a time."""
    keep_freed_memory: bool | None = None
    """On the CPU: keep the memory of freed tensors for the next ones, which is faster and takes up to three times what
    is needed, or give it back (if not said: keep it where three times what is needed is free)."""
