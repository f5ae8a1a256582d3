"""Log-probabilities of given text: those of evaluation, of any cut into chunks, and of the decoding session."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hrm_ray.inference import likelihood
from hrm_ray.inference.likelihood import token_log_probabilities
from hrm_ray.inference.text import DecodingSession
from hrm_ray.model.build import build_objective
from hrm_ray.train.evaluate_text import text_sums
from tests.support.tiny_models import tiny_config, tiny_model

TOKENS = [(5 * n * n + 3 * n + 1) % 19 for n in range(13)]
CASES: dict[str, dict[str, Any]] = {
    "actv1": {"halt_max_steps": 3},
    "window": {"window_size": 4},
    "experts": {"num_experts": 4},
    "transformer": {"arch": "transformer", "halt_max_steps": 1, "halt_rule": "none", "h_layers": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_their_sum_is_the_loss_of_evaluation(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 sums in another order: 2e-6."""
    model = tiny_model(tiny_config(**CASES[case])).eval()
    objective = build_objective(model, "softmax", supervision="rollout", halt_margin=0.01)
    ids = torch.tensor([TOKENS])
    batch = {"inputs": ids[:, :-1], "labels": ids[:, 1:], "label_bytes": torch.ones(1)}
    with torch.no_grad():
        want = float(text_sums(objective, batch)["loss"])  # type: ignore[arg-type]
    got = token_log_probabilities(model, TOKENS)
    assert got.shape == (12,) and float(got.max()) < 0
    assert -float(got.sum()) == pytest.approx(want, rel=2e-6)
    monkeypatch.setattr(likelihood, "POSITIONS_AT_ONCE", 5)
    assert torch.allclose(token_log_probabilities(model, TOKENS), got, atol=2e-6)


def test_they_are_those_of_generation() -> None:
    model = tiny_model(tiny_config(halt_max_steps=3)).eval()
    logits, _ = DecodingSession(model, adaptive=False).read(TOKENS[:-1])
    want = logits.log_softmax(-1)[torch.arange(12), torch.tensor(TOKENS[1:])]
    assert torch.allclose(token_log_probabilities(model, TOKENS), want, atol=2e-5)


@pytest.mark.parametrize("count", [0, 1, 14])
def test_a_text_that_cannot_be_scored(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} tokens"):
        token_log_probabilities(tiny_model(tiny_config(seq_len=12)), [1] * count)
