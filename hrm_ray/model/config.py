"""The architecture of a model, as config.json of a bundle stores it, and sizes derived from it.

It is complete: a model can be built from it. It holds neither weights nor training settings, and imports no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias

from hrm_ray.errors import DataError, Fault
from hrm_ray.settings.tree import RunSettings

MODEL_TYPE = "hrm_actv1"

ForwardDtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
FORWARD_DTYPES: dict[str, ForwardDtype] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Type of the activations by the name that `--model-dtype` takes."""


def swiglu_width(hidden_size: int, expansion: float) -> int:
    """Inner width of the gated FFN: two thirds of `expansion * hidden_size`, rounded up to 256.

    Python's half-to-even `round` is part of the rule (ACTv1 reference, `SwiGLU`).
    """
    return 256 * -(-round(expansion * hidden_size * 2 / 3) // 256)


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a model's tensors and how a segment is computed.

    `seq_len` counts tokens; `total_positions` also counts the prefix vectors of a puzzle embedding.
    `intermediate_size` is the FFN's inner width; without `swiglu` the FFN has no gate. `forward_dtype` is the
    activations' type, to which weights are cast at use. Without `rmsnorm` the norm is LayerNorm with weight and bias;
    `rms_norm_eps` is the epsilon of both. Dropout and the capacity of experts act in training only.
    `num_experts` 0 is a dense FFN. `window_size` is the most positions that a position of a text sees, itself included;
    None is no limit.
    """

    task: Literal["lm", "puzzle"]
    vocab_size: int
    seq_len: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    h_layers: int
    l_layers: int
    h_cycles: int
    l_cycles: int
    halt_max_steps: int
    arch: Literal["actv1", "transformer"] = "actv1"
    pos_encodings: Literal["rope", "learned", "none"] = "rope"
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    lm_mask: Literal["causal", "prefix"] = "causal"
    bp_steps: int = 2
    halt_rule: Literal["none", "gain"] = "gain"
    puzzle_emb_ndim: int = 0
    num_puzzle_identifiers: int = 1
    forward_dtype: ForwardDtype = "float32"
    activation: Literal["silu", "gelu", "relu"] = "silu"
    swiglu: bool = True
    rmsnorm: bool = True
    dropout_rate: float = 0.0
    num_experts: int = 0
    num_experts_per_tok: int = 2
    moe_capacity_factor: float = 1.25
    window_size: int | None = None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def prefix_positions(self) -> int:
        """Vectors that the puzzle embedding puts in front of the tokens."""
        return -(-self.puzzle_emb_ndim // self.hidden_size)

    @property
    def total_positions(self) -> int:
        return self.prefix_positions + self.seq_len

    @property
    def updates_per_segment(self) -> int:
        """L and H updates of one segment, in all."""
        return self.h_cycles * (self.l_cycles + 1)

    def to_plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"model_type": MODEL_TYPE, **asdict(self)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any], source: str) -> ModelConfig:
        """Read back what `to_plain` wrote. `source` names the file in the error. Raises DataError."""
        if plain.get("model_type") != MODEL_TYPE:
            raise DataError(
                Fault(
                    f"model_type {plain.get('model_type')!r} in {source}",
                    f"this is not a model of kind {MODEL_TYPE!r}",
                    "Give a bundle that hrm-ray train wrote",
                )
            )
        names = {f.name for f in fields(cls)}
        given = {k: v for k, v in plain.items() if k != "model_type"}
        unknown = sorted(given.keys() - names)
        if unknown:
            raise DataError(
                Fault(
                    f"{', '.join(unknown)} in {source}",
                    "this version does not know these parts of an architecture",
                    "Use the version of hrm_ray that wrote the bundle, or a newer one",
                )
            )
        try:
            return cls(**given)
        except TypeError as error:
            raise DataError(
                Fault(source, f"the architecture is incomplete ({error})", "Restore the file from a whole bundle")
            ) from None


def model_config(
    settings: RunSettings, vocab_size: int, *, seq_len: int | None = None, puzzle_identifiers: int = 1
) -> ModelConfig:
    """The architecture that resolved settings ask for, given what the data decides."""
    chosen = settings.model
    transformer = chosen.arch == "transformer"
    width = chosen.d_ff if chosen.d_ff is not None else swiglu_width(chosen.hidden_size, chosen.expansion)
    if chosen.task is None:
        raise ValueError("the task is not resolved; see settings.resolve")
    return ModelConfig(
        task=chosen.task,
        vocab_size=vocab_size,
        seq_len=seq_len or settings.data.max_seq_len or 0,
        hidden_size=chosen.hidden_size,
        num_heads=chosen.num_heads,
        intermediate_size=width,
        h_layers=chosen.h_layers,
        l_layers=chosen.l_layers,
        h_cycles=1 if transformer else chosen.h_cycles,
        l_cycles=1 if transformer else chosen.l_cycles,
        halt_max_steps=1 if transformer else chosen.halt_max_steps,
        arch=chosen.arch,
        pos_encodings=chosen.pos_encodings,
        rope_theta=chosen.rope_theta,
        rms_norm_eps=chosen.rms_norm_eps,
        lm_mask=chosen.lm_mask,
        window_size=chosen.window_size,
        bp_steps=1 if transformer else chosen.bp_steps,
        halt_rule="none" if transformer else chosen.halt_rule,
        puzzle_emb_ndim=chosen.puzzle_emb_ndim,
        forward_dtype=FORWARD_DTYPES[settings.memory.model_dtype],
        num_puzzle_identifiers=puzzle_identifiers,
        activation=chosen.activation,
        swiglu=chosen.swiglu,
        rmsnorm=chosen.rmsnorm,
        dropout_rate=chosen.dropout_rate,
        num_experts=chosen.num_experts if chosen.use_moe else 0,
        num_experts_per_tok=chosen.num_experts_per_tok,
        moe_capacity_factor=chosen.moe_capacity_factor,
    )
