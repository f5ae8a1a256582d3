"""The functions of `import hrm_ray`: the commands, called from Python."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from hrm_ray.cli.inference import cells_of
from hrm_ray.cli.run import train_shown
from hrm_ray.errors import Fault, SettingsError
from hrm_ray.inference.puzzle import PuzzleModel
from hrm_ray.inference.text import Sampling, TextModel
from hrm_ray.launch.devices import choose_device
from hrm_ray.launch.run import run
from hrm_ray.launch.run_directory import load_run
from hrm_ray.launch.stopping import StopWatch
from hrm_ray.types import MetricSink, RunResult, StopReason, StopRequested


def train_with(config: str | Path | None, sink: MetricSink | None, given: Mapping[str, Any]) -> RunResult:
    """See hrm_ray.train."""
    settings = load_run(flat_options(given), None if config is None else Path(config))
    watch = StopWatch(settings.run.stop_file)
    try:
        with _interruptible(watch) as begin:
            if sink is not None:
                return run(settings, sink=sink, stop=watch.poll, on_start=begin)
            return train_shown(settings, stop=watch.poll, on_start=begin)
    except StopRequested as stopped:
        if stopped.reason is StopReason.INTERRUPT:
            raise KeyboardInterrupt from None
        raise


def flat_options(given: Mapping[str, Any]) -> dict[str, str | bool]:
    """Keywords as options of the command line: `use_moe=False` is `--use-moe false`. None leaves an option out."""
    flat: dict[str, str | bool] = {}
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if isinstance(value, bool):
            flat[flag] = True if value else "false"
        elif isinstance(value, (list, tuple)):
            flat[flag] = ",".join(map(str, value))
        else:
            flat[flag] = str(value)
    return flat


@contextmanager
def _interruptible(watch: StopWatch) -> Iterator[Any]:
    """An interrupt asks the run to stop, once it has begun (the function that this yields was called); before that, and
    at the second time, it raises KeyboardInterrupt. The program's own handler is put back at the end."""
    begun = False

    def begin() -> None:
        nonlocal begun
        begun = True

    def interrupted(number: int, frame: FrameType | None) -> None:
        if not begun or watch.reason is not None:
            raise KeyboardInterrupt
        watch.reason = StopReason.INTERRUPT

    if threading.current_thread() is not threading.main_thread():
        yield begin
        return
    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield begin
    finally:
        signal.signal(signal.SIGINT, before)


def generated(
    bundle: Path, prompt: str, max_new_tokens: int, sampling: tuple[float, int, float], seed: int, device: str
) -> str:
    """See hrm_ray.generate."""
    model = TextModel.open(bundle, torch.device(choose_device(device)))
    text = model.complete(prompt, sampling=Sampling(*sampling), max_new_tokens=max_new_tokens, seed=seed)
    for note in text.notes:
        print(note, file=sys.stderr)
    with torch.inference_mode():
        return "".join(text)


def solved(
    bundle: Path,
    puzzles: list[str],
    file: Path | None,
    split: str | None,
    limit: int | None,
    *,
    stop_by_q: bool,
    device: str,
) -> list[str | list[int]]:
    """See hrm_ray.solve."""
    if bool(puzzles) == (file is not None):
        raise SettingsError(Fault("puzzles or file", "exactly one of them is needed", "Give puzzles, or file=PATH"))
    model = PuzzleModel.open(bundle, torch.device(choose_device(device)))
    given = model.from_file(file, split, limit) if file is not None else model.from_words(puzzles[:limit])
    return [cells_of(model.facts, one.answer) for one in model.solve(given, stop_by_q=stop_by_q)]
