"""The picture of a run: the display of a real run at one step, as an SVG for the README.

`python -m tests.benchmarks.picture --out docs/run.svg`
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from hrm_ray.cli.run import describe, display_schedule
from hrm_ray.data.builders.sudoku import build_sudoku
from hrm_ray.launch.resolve import resolve
from hrm_ray.launch.run import run
from hrm_ray.launch.run_directory import load_run
from hrm_ray.metrics.console import LiveBlock
from hrm_ray.metrics.display_state import DisplayState
from hrm_ray.types import Record, StopReason

COLUMNS = 92
COMMANDS = (
    "hrm-ray data build sudoku --size 4 --train 20000 --test 1000 --out sudoku4-data",
    "hrm-ray train --config sudoku4 --dataset-file sudoku4-data",
)


class Picture:
    """A sink that draws the display at step `at`, after which the run is stopped."""

    def __init__(self, state: DisplayState, header: str, at: int) -> None:
        self.state = state
        self.at = at
        self.done = False
        self.console = Console(
            record=True,
            file=io.StringIO(),
            width=COLUMNS,
            force_terminal=True,
            color_system="truecolor",
            highlight=False,
        )
        for command in COMMANDS:
            self.console.print(Text.assemble(("$ ", "bold green"), command))
        self.console.print(header)

    def write(self, record: Record) -> None:
        """Take one record."""
        if self.done:
            return
        self.state.add(record)
        if record.kind == "progress" and record.step >= self.at:
            self.console.print(LiveBlock(self.state))
            self.done = True

    def close(self) -> None:
        """Nothing is open."""


def draw(out: Path, at: int, train: int = 20000) -> None:
    """Train in a temporary folder up to step `at`, and write the picture."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            build_sudoku(Path("sudoku4-data"), size=4, train=train, test=train // 20)
            resolved = resolve(load_run({"--dataset-file": "sudoku4-data"}, Path("sudoku4")))
            header = describe(resolved).replace(f"{Path(folder).resolve()}{os.sep}", "")
            picture = Picture(DisplayState(display_schedule(resolved)), header, at)
            run(resolved, sink=picture, stop=lambda: StopReason.INTERRUPT if picture.done else None)
        finally:
            os.chdir(before)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(picture.console.export_svg(title="hrm-ray train"), encoding="utf-8")


def main() -> None:
    """Read the arguments and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/run.svg"))
    parser.add_argument("--at", type=int, default=1760)
    given = parser.parse_args()
    draw(given.out, given.at)
    print(given.out)


if __name__ == "__main__":
    main()
