"""What each memory option costs and saves: `python -m tests.benchmarks.bench_options` prints one table and writes JSON.

Every case of option_cases.py runs on real text beside the plain run, in one process. Measured are the bytes of weights,
gradients, optimizer state and activations, the time of a step as a ratio to the plain run's, and the loss after some
steps. Bytes are those of the tensors themselves, counted at every operation of one step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hrm_ray.data.packing import TextSamples
from hrm_ray.data.text_data import TextDataDir, TextPlan
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.errors import HrmRayError
from hrm_ray.model.config import ModelConfig, model_config
from hrm_ray.rundir import RunDir, read_json
from hrm_ray.settings.load import load_settings
from hrm_ray.settings.resolve import resolve_task
from hrm_ray.train.assemble import assemble
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.optimizer_state import optimizer_bytes
from hrm_ray.train.storage_tracker import StorageTracker, storage_bytes
from hrm_ray.train.strategies.single import SingleStrategy
from hrm_ray.train.world import World
from hrm_ray.types import SampleSet
from tests.benchmarks.option_cases import CASES, PLAIN, OptionCase
from tests.benchmarks.timing import Summary, hrm_ray_command, in_turn, machine, plain, summary, table

SIZE = ("--hidden-size", "128", "--num-heads", "4", "--max-seq-len", "128", "--batch-size", "8")
"""The default model and micro-batch."""
BASE_STEPS = 40
"""Updates of the bundle that cases with a frozen base start from."""


@dataclass(frozen=True)
class Account:
    """Bytes of one worker's tensors: three that stay, and the most that a step's passes had besides."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Place:
    """What all cases share: the text as tokens, the trained base, size options, device, steps for the loss."""

    samples: SampleSet
    base: RunDir
    size: tuple[str, ...]
    vocab_size: int
    device: str
    threads: int
    steps: int


def options_of(words: Sequence[str]) -> dict[str, str | bool]:
    """Command-line words as the options of `load_settings`; the last value of a repeated option counts."""
    said: dict[str, str | bool] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, said[word] = word, True
        else:
            said[name] = word
    for off in [name for name in said if name.startswith("--no-")]:
        on = off.replace("--no-", "--use-") if off == "--no-moe" else off.replace("--no-", "--")
        if on in said:
            del said[off]
    return said


def loop_of(case: OptionCase, place: Place) -> TrainingLoop:
    """A loop as a run with the case's words would build it."""
    words = [*place.size, *PLAIN, *case.words, "--steps", str(place.steps), "--device", place.device]
    if case.starts:
        words += ["--student-init", str(place.base.root)]
    settings = resolve_task(load_settings(options_of(words)), "lm")
    config = model_config(settings, place.vocab_size)
    world = World.here(place.device, place.threads)
    return assemble(settings, config, place.samples, world, place.steps)


def account(loop: TrainingLoop) -> Account:
    """Bytes of a step that finds the optimizer's state in place."""
    strategy, objective = loop.parts.strategy, loop.parts.objective
    assert isinstance(strategy, SingleStrategy)
    optimizer = strategy.optimizer
    weights = [*objective.parameters(), *objective.buffers()]
    reduce, gradients = strategy.reduce, [0]
    watch = StorageTracker()

    def reduce_and_name(failed: bool) -> bool:
        found = [p.grad for p in objective.parameters() if p.grad is not None]
        watch.name("gradients", found)
        gradients[0] = storage_bytes(found)
        return reduce(failed)

    strategy.reduce = reduce_and_name  # type: ignore[method-assign]
    with watch:
        watch.name("weights", weights)
        watch.name("optimizer", (v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)))
        loop.step()
    strategy.reduce = reduce  # type: ignore[method-assign]
    activations = watch.peak_bytes(beside=("weights", "gradients", "optimizer"))
    return Account(storage_bytes(weights), gradients[0], optimizer_bytes(optimizer), activations)


def ratio(case: TrainingLoop, beside: TrainingLoop, rounds: int) -> Summary:
    """Seconds a step of `case` takes, over those of `beside`, in interleaved pairs."""
    pairs = [in_turn(number, (case.step, beside.step)) for number in range(rounds)]
    return summary([one.wall_s / other.wall_s for one, other in pairs])


def loss_after(loop: TrainingLoop, steps: int) -> tuple[float, float]:
    """Mean loss of the first tenth of `steps` and of the last."""
    losses = []
    for _ in range(steps):
        loop.step()
        losses.append(loop.flush_metrics()["loss"])
    tenth = max(1, steps // 10)
    return statistics.fmean(losses[:tenth]), statistics.fmean(losses[-tenth:])


def measure(case: OptionCase, place: Place, rounds: int) -> dict[str, Any]:
    """One row, or the reason why the case cannot run here."""
    if case.needs_gpu and place.device == "cpu":
        return {"case": case.name, "refused": "needs a device with memory of its own"}
    try:
        begin, end = loss_after(loop_of(case, place), place.steps)
        loop, beside = loop_of(case, place), loop_of(CASES[0], place)
        for each in (loop, beside):
            each.step()
        bytes_now = account(loop)
        return {"case": case.name, "words": list(case.words), "bytes": vars(bytes_now) | {"total": bytes_now.total},
                "step_time_ratio": ratio(loop, beside, rounds), "loss_begin": begin, "loss_end": end}  # fmt: skip
    except HrmRayError as error:
        return {"case": case.name, "refused": str(error)}


def prepare(folder: Path, corpus: Path | None, size: tuple[str, ...], device: str, threads: int, steps: int) -> Place:
    """Text from Python's documentation, tokenised, and a small dense bundle trained on it."""
    if corpus is None:
        corpus = folder / "corpus"
        hrm_ray_command(["data", "build", "text", "--out", corpus])
    base = folder / "base"
    words = ["--launcher", "local", "--vocab-size", "4096", "--tokenizer-train-examples", "200", "--lr", "1e-3"]
    words += ["--threads", str(threads), "--steps", str(BASE_STEPS), *PLAIN, *size]
    hrm_ray_command(["train", "--dataset-file", corpus, "--bundle-dir", base, *words])
    run_dir = RunDir(base)
    data = read_json(run_dir.training_args)["data"]
    config = ModelConfig.from_plain(read_json(run_dir.config), str(run_dir.config))
    plan = TextPlan.from_plain(data)
    pipeline = TextDataDir(run_dir.data).pipeline(
        plan.chunking_config, plan.source, TextTokenizer.load(run_dir.root), pairs=False, writes=False
    )
    chunk = pipeline.get(0)
    assert chunk is not None, "the base was trained on it"
    samples = TextSamples(chunk.store, plan.form)
    size = (*size, "--lr", "1e-3", "--no-linear-dataset")
    return Place(samples, run_dir, size, config.vocab_size, device, threads, steps)


def shown(rows: Sequence[dict[str, Any]]) -> str:
    """The table for a terminal; bytes in MB."""
    titles = ("option", "weights", "gradients", "optimizer", "activations", "all MB", "step time", "loss")
    lines = []
    for row in rows:
        if "refused" in row:
            lines.append((row["case"], "", "", "", "", "", "", f"refused: {row['refused'][:40]}"))
            continue
        parts = [f"{row['bytes'][name] / 1e6:.2f}" for name in ("weights", "gradients", "optimizer", "activations")]
        loss = f"{row['loss_begin']:.2f} -> {row['loss_end']:.2f}"
        lines.append((row["case"], *parts, f"{row['bytes']['total'] / 1e6:.1f}", row["step_time_ratio"].shown(2), loss))
    return table(titles, lines)


def main() -> None:
    """Read the options, measure every case, print and write."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="updates after which the loss is compared")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved pairs of steps for the time ratio")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--corpus", type=Path, help="text to train on, in place of Python's documentation")
    parser.add_argument("--size", nargs="*", default=SIZE)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    said = parser.parse_args()
    progress: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    with tempfile.TemporaryDirectory() as folder:
        place = prepare(Path(folder), said.corpus, tuple(said.size), said.device, said.threads, said.steps)
        rows = []
        for case in CASES:
            if said.only in case.name:
                progress(case.name)
                rows.append(measure(case, place, said.rounds))
    print(shown(rows))
    if said.json is not None:
        said.json.write_text(
            json.dumps(plain({"machine": machine(said.threads), "size": said.size, "rows": rows}), indent=1)
        )


if __name__ == "__main__":
    main()
