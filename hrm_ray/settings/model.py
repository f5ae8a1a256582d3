"""Settings of the model: the network, its attention mask, halting and loss."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from hrm_ray.settings.base import Section, option, switch_aliases
from hrm_ray.settings.needs import (
    CARRIED_PUZZLES,
    CYCLES,
    EXPERTS,
    GAIN_RULE,
    ROOM_TO_EXPLORE,
    ROPE,
    SEVERAL_SEGMENTS,
    TEXT,
    WINDOW_WITHIN_ROW,
)

Task: TypeAlias = Literal["lm", "puzzle"]


CHOSEN = "where a size is given, else chosen from the data and the device"


class ModelSettings(Section):
    """The network and its objective."""

    task: Task | None = option(None, "fixed", unset="detected from the data")
    """Task: lm (predict the next token of text) or puzzle (predict a label for each cell)."""
    arch: Literal["actv1", "transformer"] = option("actv1", "fixed")
    """Architecture: actv1 is the HRM; transformer is a plain causal transformer of the same block, for comparison."""
    model_preset: Literal["nano", "tiny", "small", "medium", "large", "xlarge"] | None = option(
        None, "free", unset="chosen from the data and the device, if no size is given"
    )
    """Named size of about 5, 15, 50, 150, 400 or 1000 million parameters; other options override it."""
    h_layers: int = option(2, "fixed", ge=1, replaces=("model.num_layers",), unset=f"2 {CHOSEN}")
    """Layers of the high level (H)."""
    l_layers: int = option(2, "fixed", ge=1, replaces=("model.num_layers",), unset=f"2 {CHOSEN}")
    """Layers of the low level (L)."""
    num_layers: int | None = option(
        None, "free", ge=2, replaces=("model.h_layers", "model.l_layers"), unset="--h-layers and --l-layers"
    )
    """An even number of layers, split evenly over H and L."""
    hidden_size: int = option(512, "fixed", ge=1, aliases={"--d-model": None}, unset=f"512 {CHOSEN}")
    """Width of the model; a multiple of --num-heads."""
    num_heads: int = option(8, "fixed", ge=1, unset=f"8 {CHOSEN}")
    """Attention heads."""
    expansion: float = option(2.0, "fixed", gt=0, replaces=("model.d_ff",), unset=f"2.0 {CHOSEN}")
    """Width of the feed-forward layer relative to the model, before SwiGLU's 2/3, rounded up to a multiple of 256."""
    d_ff: int | None = option(None, "fixed", ge=1, unset="the width of --expansion")
    """Exact width of the feed-forward layer."""
    h_cycles: int = option(2, "fixed", ge=1, needs=(CYCLES,))
    """H updates in one segment."""
    l_cycles: int = option(2, "fixed", ge=1, needs=(CYCLES,))
    """L updates before each H update."""
    pos_encodings: Literal["rope", "learned", "none"] = option(
        "rope", "fixed", aliases={"--no-rope": "learned", "--rope": "rope"}
    )
    """Position encoding: rotary (rope), a learned table (learned), or none."""
    rope_theta: float = option(10000.0, "fixed", gt=0, needs=(ROPE,))
    """Base of the rotary frequencies."""
    rms_norm_eps: float = option(1e-5, "fixed", gt=0)
    """Epsilon of RMSNorm (added to the mean square) or LayerNorm (added to the variance)."""
    rmsnorm: bool = option(True, "fixed")
    """RMSNorm without a weight; otherwise LayerNorm with weight and bias."""
    activation: Literal["silu", "gelu", "relu"] = option("silu", "fixed")
    """Activation function of the feed-forward layer."""
    swiglu: bool = option(True, "fixed")
    """Gated feed-forward layer (GLU); otherwise two matrices of the same inner width."""
    dropout_rate: float = option(0.0, "free", ge=0, lt=1)
    """Dropout after attention and after the feed-forward layer."""
    lm_mask: Literal["causal", "prefix"] = option("causal", "fixed", affects=("rows",), needs=(TEXT,))
    """Attention mask of a language model: causal, or prefix (full in the prompt, causal in the response)."""
    use_moe: bool = option(False, "fixed", aliases=switch_aliases("--moe"), legacy_default=False)
    """Mixture of experts in place of every feed-forward layer."""
    num_experts: int = option(8, "fixed", ge=2, needs=(EXPERTS,))
    """Experts of each block, each as wide as the feed-forward layer would be."""
    num_experts_per_tok: int = option(2, "fixed", ge=1, needs=(EXPERTS,))
    """Experts that each token is routed to."""
    moe_capacity_factor: float = option(1.25, "free", gt=0, needs=(EXPERTS,))
    """Capacity of an expert in training, as a multiple of its even share of a sequence; tokens above it are dropped."""
    moe_load_balance_coef: float = option(0.01, "free", ge=0, needs=(EXPERTS,))
    """Coefficient of the load-balancing loss of the experts."""
    moe_router_z_coef: float = option(0.001, "free", ge=0, needs=(EXPERTS,))
    """Coefficient of the router z-loss, which keeps the routers' logits small."""
    window_size: int | None = option(None, "fixed", ge=1, needs=(WINDOW_WITHIN_ROW,), unset="all positions before it")
    """Sliding-window attention on text: the most positions, itself included, that a position attends to."""
    use_flash_attn: bool | None = option(
        None,
        "free",
        aliases=switch_aliases("--flash-attn"),
        unset="on where it is installed and the GPU supports it",
    )
    """Compute attention with FlashAttention."""
    supervision: Literal["segment", "rollout"] | None = option(
        None, "fixed", unset="segment for puzzles, rollout for text"
    )
    """segment: one weight update per segment, with the carry kept; rollout: all segments, then one update."""
    bp_steps: int = option(2, "free", ge=1, needs=(CYCLES,))
    """How many of a segment's last L and H updates carry gradient; 2 is the reference's one-step gradient."""
    halt_max_steps: int = option(2, "fixed", ge=1, needs=(CYCLES,))
    """Maximum number of segments for one input."""
    halt_exploration_prob: float | None = option(
        None, "free", ge=0, le=1, needs=(CYCLES, CARRIED_PUZZLES, ROOM_TO_EXPLORE), unset="0.1 for puzzles, 0 for text"
    )
    """Halting exploration: probability that a puzzle must run a random minimum number of segments."""
    halt_rule: Literal["none", "gain"] = option("gain", "free", needs=(CYCLES, TEXT, SEVERAL_SEGMENTS))
    """Target of a text token's halting head: gain (would one more segment lower the loss?) or none."""
    halt_margin: float = option(0.01, "free", ge=0, needs=(CYCLES, GAIN_RULE, TEXT, SEVERAL_SEGMENTS))
    """By how many nats one more segment must lower a token's loss to count as a gain."""
    loss: Literal["softmax", "stablemax"] | None = option(
        None, "fixed", unset="stablemax for puzzles, softmax for text"
    )
    """Cross entropy over softmax or stablemax."""
    puzzle_emb_ndim: int = option(0, "fixed", ge=0)
    """Width of the learned embedding of each puzzle identifier; 0 disables it."""
    student_init: Path | None = option(None, "fixed", unset="random weights")
    """Start from the weights of this bundle, or of an original HRM checkpoint."""
    expert_index: int | None = option(
        None, "fixed", ge=0, unset="all experts; with --expert-id the first that is not stored yet"
    )
    """Train only this expert of every block, counted from 0; everything else is frozen."""
