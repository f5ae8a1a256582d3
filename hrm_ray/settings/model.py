"""Settings of the model: the network, its mask, how it halts and what its loss is.

One job: the leaves of section `model`. What a leaf does is in `hrm_ray.model`; rules between leaves are in `rules`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import Field

from hrm_ray.settings.base import Section

Task: TypeAlias = Literal["lm", "puzzle"]
Arch: TypeAlias = Literal["actv1", "transformer"]
PosEncodings: TypeAlias = Literal["rope", "learned", "none"]
LmMask: TypeAlias = Literal["causal", "prefix"]
Supervision: TypeAlias = Literal["segment", "rollout"]
HaltRule: TypeAlias = Literal["none", "gain"]
Activation: TypeAlias = Literal["silu", "gelu", "relu"]
LossKind: TypeAlias = Literal["softmax", "stablemax"]
ModelPreset: TypeAlias = Literal["nano", "tiny", "small", "medium", "large", "xlarge"]


class ModelSettings(Section):
    """The network and its objective."""

    task: Task | None = None
    """What is learned: lm (next token of text) or puzzle (labels beside inputs); told from the data if not said."""
    arch: Arch = "actv1"
    """actv1 is the HRM; transformer a plain causal transformer of the same block, to compare with."""
    model_preset: ModelPreset | None = None
    """A named size of about 5, 15, 50, 150, 400 or 1000 million parameters; every single option still overrides it."""
    h_layers: int = Field(default=2, ge=1)
    """Layers of the high level (H)."""
    l_layers: int = Field(default=2, ge=1)
    """Layers of the low level (L)."""
    num_layers: int | None = Field(default=None, ge=2)
    """An even number of layers, split evenly over H and L, in place of --h-layers and --l-layers."""
    hidden_size: int = Field(default=512, ge=1)
    """Width of the model; the number of heads must divide it."""
    num_heads: int = Field(default=8, ge=1)
    """Attention heads."""
    expansion: float = Field(default=2.0, gt=0)
    """Width of the feed-forward part relative to the model, before the 2/3 of SwiGLU and rounding up to 256."""
    d_ff: int | None = Field(default=None, ge=1)
    """Exact width of the feed-forward part, in place of --expansion."""
    h_cycles: int = Field(default=2, ge=1)
    """H updates in one segment."""
    l_cycles: int = Field(default=2, ge=1)
    """L updates before each H update."""
    pos_encodings: PosEncodings = "rope"
    """How positions are told: rotary (rope), a learned table (learned), or not at all (none)."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary frequencies."""
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the mean square in RMSNorm, or to the variance in LayerNorm."""
    rmsnorm: bool = True
    """RMSNorm without a weight; otherwise LayerNorm with weight and bias."""
    activation: Activation = "silu"
    """Nonlinearity of the feed-forward part."""
    swiglu: bool = True
    """A gate in the feed-forward part; otherwise two matrices of the same inner width."""
    dropout_rate: float = Field(default=0.0, ge=0, lt=1)
    """Share of the values that dropout sets to 0 behind attention and feed-forward part, in training."""
    lm_mask: LmMask = "causal"
    """Attention of a language model: causal, or prefix (full inside the prompt, causal in the response)."""
    use_moe: bool = True
    """Sparse experts in place of the feed-forward part of every block."""
    num_experts: int = Field(default=8, ge=2)
    """Experts of each block, each as wide as the feed-forward part would be."""
    num_experts_per_tok: int = Field(default=2, ge=1)
    """Experts that each token goes through."""
    moe_capacity_factor: float = Field(default=1.25, gt=0)
    """In training an expert takes this many times its even share of a sequence; what is over is dropped."""
    moe_load_balance_coef: float = Field(default=0.01, ge=0)
    """Weight in the loss of the term that keeps the experts of a sequence evenly used."""
    moe_router_z_coef: float = Field(default=0.001, ge=0)
    """Weight in the loss of the term that keeps the routers' scores small."""
    window_size: int | None = Field(default=None, ge=1)
    """How many positions of a text, itself included, a position sees at most (if not said: all before it)."""
    use_flash_attn: bool | None = None
    """Compute attention with FlashAttention (if not said: where it is installed and the GPU can)."""
    supervision: Supervision | None = None
    """segment: a weight update per segment, the carry kept; rollout: all segments, then one update
    (if not said: segment for puzzles, rollout for text)."""
    bp_steps: int = Field(default=2, ge=1)
    """How many of a segment's last L and H updates carry gradient; 2 is the reference's one-step gradient."""
    halt_max_steps: int = Field(default=2, ge=1)
    """At most this many segments for one input."""
    halt_exploration_prob: float | None = Field(default=None, ge=0, le=1)
    """Chance that a puzzle must think a random number of segments before it may halt
    (if not said: 0.1 for puzzles; text has none)."""
    halt_rule: HaltRule = "gain"
    """What a text token's halting head learns: gain (would one more segment lower the loss?) or none."""
    halt_margin: float = Field(default=0.01, ge=0)
    """By how many nats a further segment must lower a token's loss to count as a gain."""
    loss: LossKind | None = None
    """Cross entropy over softmax or stablemax (if not said: stablemax for puzzles, softmax for text)."""
    puzzle_emb_ndim: int = Field(default=0, ge=0)
    """Width of the embedding learned per puzzle identifier; 0 is none."""
    student_init: Path | None = None
    """Start from these weights: a bundle of this project, or an original HRM checkpoint."""
    expert_index: int | None = Field(default=None, ge=0)
    """Train only this expert of every block, counted from 0, with everything else frozen."""
