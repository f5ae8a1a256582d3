"""The architecture of a model, as config.json of a bundle stores it, and sizes derived from it.

It is complete: a model can be built from it. It holds neither weights nor training settings, and imports no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias

from hrm_ray.errors import DataError, Fault

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
