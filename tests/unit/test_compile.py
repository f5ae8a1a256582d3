"""--compile: the same numbers, a bounded number of graphs, and eager blocks where compiling cannot be had.

The backend is aot_eager, which traces, guards and recompiles as inductor does and needs no compiler.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hrm_ray.errors import UnavailableError
from hrm_ray.inference.text import Sampling, sample_text
from hrm_ray.model.transforms import compile as compiling
from hrm_ray.model.transforms.compile import CompiledCalls, compile_notes, compile_obstacle, compiles
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.assemble import assemble
from hrm_ray.train.evaluate import EvalSet, evaluate
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.world import World
from tests.support.runs import TEXT, hrm, records, text_file, train
from tests.support.splits import Cut, Rows, config_for, settings_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _aot_eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def settings_with(scenario: str, compiled: bool, **sections: Mapping[str, Any]) -> RunSettings:
    settings = settings_for(scenario, "sgd", Cut(1, 1, 8))
    update = {
        section: settings.__dict__[section].model_copy(update=leaves)
        for section, leaves in {"cluster": {}, **sections}.items()
    }
    update["cluster"] = update["cluster"].model_copy(update={"compile": compiled})
    return settings.model_copy(update=update)


def loop_of(scenario: str, compiled: bool, **sections: Mapping[str, Any]) -> TrainingLoop:
    settings = settings_with(scenario, compiled, **sections)
    config = config_for(settings)
    return assemble(settings, config, Rows(config.task), World.here("cpu", 1), 10)


def steps(loop: TrainingLoop, number: int) -> list[float]:
    """Gradient norms of the next steps, and their mean loss."""
    norms = []
    for _ in range(number):
        report = loop.step()
        assert report is not None
        norms.append(report.norm)
    return [*norms, loop.flush_metrics()["objective"]]


def graphs(loop: TrainingLoop) -> int:
    calls = loop.parts.compiled
    assert calls is not None
    assert calls.failure is None
    return calls.graphs


BF16 = {"activations": "bf16", "amp": True}
PEFT = {"use_peft": True, "lora_dropout": 0.0, "lora_r": 2, "lora_target_modules": "q_proj,down_proj"}
CASES: dict[str, tuple[str, dict[str, Mapping[str, Any]], int, float]] = {
    "text": ("text", {}, 4, 1e-5),
    "text, dropout": ("text", {"model": {"dropout_rate": 0.3}}, 4, 1e-5),
    "text, bf16 states": ("text", {"memory": BF16}, 4, 0.02),
    "text, fp16 products": ("text", {"memory": {"amp": True, "amp_dtype": "fp16"}}, 4, 0.02),
    "text, recomputed": ("text", {"memory": {"gradient_checkpointing": True}}, 4, 1e-5),
    "text, narrow weights": ("text", {"memory": {"model_dtype": "bf16"}}, 4, 0.05),
    "text, adapters": ("text", {"adapt": PEFT}, 8, 1e-5),
    "text, averaged": ("text", {"optimizer": {"ema": 0.9}}, 4, 1e-5),
    "transformer": ("transformer", {}, 2, 1e-5),
    "experts": ("text-experts", {}, 4, 1e-5),
    "window, chunks of several lengths": ("chunked", {}, 8, 1e-5),
    "exact chunks, experts": ("chunked-exact-experts", {}, 8, 1e-5),
    "puzzle": ("puzzle-carried", {}, 2, 1e-5),
    "puzzle, embedding": ("puzzle-rollout", {}, 2, 1e-5),
}
"""Scenario, changed leaves, the most graphs (gradient modes x functions x lengths), relative tolerance."""


@pytest.mark.parametrize("case", CASES)
def test_same_numbers_and_no_recompilation_after_the_first_step(case: str) -> None:
    scenario, sections, most, tolerance = CASES[case]
    loop = loop_of(scenario, True, **sections)
    found = steps(loop, 1)
    first = graphs(loop)
    assert 0 < first <= most
    found += steps(loop, 4)
    assert graphs(loop) == first
    plain = loop_of(scenario, False, **sections)
    assert plain.parts.compiled is None
    assert found == pytest.approx(steps(plain, 1) + steps(plain, 4), rel=tolerance)
    assert loop.parts.objective.state_dict().keys() == plain.parts.objective.state_dict().keys()


def test_evaluation_compiles_once_for_each_size_of_a_batch() -> None:
    loop = loop_of("puzzle-carried", True)
    steps(loop, 1)
    before = graphs(loop)
    held_out = EvalSet(Rows("puzzle", 21), 8, 3)
    evaluate(loop.parts.objective, held_out, loop.world)
    after = graphs(loop)
    # Whole batches of 8 are known from training, the last one of 5 is not.
    assert after == before + 1
    for _ in range(3):
        steps(loop, 1)
        evaluate(loop.parts.objective, held_out, loop.world)
    assert graphs(loop) == after


def test_sampling_a_text_while_training_compiles_nothing() -> None:
    """Each length of the text would be a graph."""

    class Tokenizer:
        end_of_text_id = -1

        def encode(self, text: str) -> list[int]:
            return list(range(1, 1 + len(text)))

        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    loop = loop_of("text", True)
    steps(loop, 1)
    before = graphs(loop)
    model = loop.parts.objective.model
    sample_text(model, Tokenizer(), "abc", sampling=Sampling(0.0), max_new_tokens=5)  # type: ignore[arg-type]
    steps(loop, 1)
    assert graphs(loop) == before


def test_a_backend_that_fails_leaves_eager_blocks_and_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(compiling, "BACKEND", failing)
    data = text_file(tmp_path)
    train(data, tmp_path / "c", *TEXT, "--steps", "3", "--log-every", "1", "--compile")
    warnings = [r["message"] for r in records(tmp_path / "c", "event") if r["level"] == "WARNING"]
    assert [message for message in warnings if "no kernel for this" in message] == warnings
    assert len(warnings) == 1
    train(data, tmp_path / "e", *TEXT, "--steps", "3", "--log-every", "1", "--no-compile")
    losses = [[record["loss"] for record in records(tmp_path / name)] for name in "ce"]
    assert losses[0] == losses[1]
    refused = hrm("train", "--dataset-file", data, "--bundle-dir", tmp_path / "s", *TEXT, "--compile", "--strict")
    assert refused.code == UnavailableError.exit_code
    assert "--no-compile" in refused.err


def test_lack_of_memory_while_compiling_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compiling, "BACKEND", failing)
    calls = CompiledCalls(strict=False)
    with pytest.raises(torch.OutOfMemoryError):
        calls(lambda x: 2 * x, torch.ones(1))
    assert calls.failure is None


def test_a_compiled_run_is_resumed_compiled_and_eagerly(tmp_path: Path) -> None:
    data = text_file(tmp_path)
    words = (*TEXT, "--log-every", "1", "--save-every", "2", "--compile")
    train(data, tmp_path / "b", *words, "--steps", "2")
    for steps_in_all, option in (("4", "--compile"), ("6", "--no-compile")):
        again = hrm("train", "--bundle-dir", tmp_path / "b", "--resume", "--steps", steps_in_all, option)
        assert again.code == 0, again.err
    found = records(tmp_path / "b")
    assert ["compiled_graphs" in record for record in found] == [True] * 4 + [False] * 2
    train(data, tmp_path / "e", *TEXT, "--log-every", "1", "--steps", "2")
    assert [r["loss"] for r in found[:2]] == pytest.approx([r["loss"] for r in records(tmp_path / "e")], rel=1e-5)


def test_a_run_leaves_the_limit_of_recompilations_as_it_was(tmp_path: Path) -> None:
    with torch._dynamo.config.patch(recompile_limit=5):
        train(text_file(tmp_path), tmp_path / "b", *TEXT, "--steps", "1", "--compile")
        assert torch._dynamo.config.recompile_limit == 5


def test_where_blocks_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = RunSettings()
    asked = settings_with("text", True)
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    monkeypatch.setattr(compiling, "find_spec", lambda name: object())
    monkeypatch.setattr(compiling.shutil, "which", lambda name: f"/bin/{name}")
    assert compiles(plain, CUDA)
    assert not compiles(plain, CPU)
    assert compiles(asked, CPU)
    assert not compiles(settings_with("text", False), CUDA)
    eight = settings_with("text", True, memory={"load_in_8bit": True})
    assert "8 or 4 bits" in (compile_obstacle(eight, CUDA) or "")
    dropped = settings_with("text", True, adapt={"use_peft": True, "lora_dropout": 0.1})
    assert "--lora-dropout 0" in (compile_obstacle(dropped, CUDA) or "")
    assert "mps" in (compile_obstacle(asked, torch.device("mps")) or "")
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    assert not compiles(plain, CUDA)
    assert "no compiler found" in (compile_obstacle(asked, CPU) or "")
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    assert not compiles(plain, CUDA)
    assert compile_notes(plain, CUDA) == []
    (note,) = compile_notes(asked, CUDA)
    assert "Triton is not installed" in note
    strict = asked.model_copy(update={"cluster": asked.cluster.model_copy(update={"strict": True})})
    with pytest.raises(UnavailableError, match="--compile"):
        compile_notes(strict, CUDA)
