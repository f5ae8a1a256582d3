"""The demonstration, run by `make demo`: a puzzle model learns 4x4 Sudoku and a language model Python's documentation.

Every step is a `hrm-ray` command, printed before it runs, and both trainings go through Ray.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

from hrm_ray.metrics.jsonl import read_records
from hrm_ray.metrics.text_chart import loss_chart

HOME = Path("artifacts")
PROMPT = "The function returns"
PUZZLE = "1....2..3......4"


def command(*words: str | Path) -> None:
    """Print a hrm-ray command and run it; the demonstration ends where it fails."""
    shown = [str(word) for word in words]
    print(f"\n$ hrm-ray {shlex.join(shown)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "hrm_ray", *shown], check=False).returncode
    if code:
        raise SystemExit(code)


def heading(text: str) -> None:
    print(f"\n=== {text} ===", flush=True)


def fresh_folder() -> Path:
    """artifacts/demo, or artifacts/demo-2 and so on where that is taken."""
    folder, number = HOME / "demo", 2
    while folder.exists():
        folder, number = HOME / f"demo-{number}", number + 1
    return folder


def figures(bundle: Path) -> dict[str, float]:
    """The last held-out figures of a run."""
    last = [record for record in read_records(bundle / "metrics.jsonl") if record.kind == "eval"][-1]
    return {name: value for name, value in last.values.items() if isinstance(value, int | float)}


def main() -> None:
    home = fresh_folder()
    sudoku, puzzle_bundle = home / "sudoku4", home / "sudoku4-model"
    corpus, text_bundle = home / "python-docs", home / "python-docs-model"

    heading("1. Sudoku: a Hierarchical Reasoning Model learns to solve puzzles it has never seen")
    command("data", "build", "sudoku", "--size", "4", "--train", "20000", "--test", "1000", "--out", sudoku)
    began = time.monotonic()
    command(
        *("train", "--config", "sudoku4", "--launcher", "ray", "--dataset-file", sudoku),
        *("--bundle-dir", puzzle_bundle),
    )
    puzzle_minutes = (time.monotonic() - began) / 60
    command("solve", puzzle_bundle, "--file", sudoku, "--limit", "2", "--stop-by-q")

    heading("2. Text: a language model on the documentation that comes with Python")
    command("data", "build", "text", "--out", corpus)
    began = time.monotonic()
    command(
        *("train", "--config", "python_docs", "--launcher", "ray", "--dataset-file", corpus),
        *("--bundle-dir", text_bundle),
    )
    text_minutes = (time.monotonic() - began) / 60
    print("\ntraining loss (nats per token)")
    print(loss_chart(read_records(text_bundle / "metrics.jsonl"), 72, encoding=sys.stdout.encoding))
    command("generate", text_bundle, "--prompt", PROMPT, "--max-new-tokens", "80", "--temperature", "0.7")

    heading("3. What there is now")
    plot = home / "loss.png"
    command("plot", puzzle_bundle, text_bundle, "--out", plot)
    print(summary(figures(puzzle_bundle), puzzle_minutes, figures(text_bundle), text_minutes))
    print(f"""bundles  {puzzle_bundle}
         {text_bundle}
plot     {plot}
curves   tensorboard --logdir {home}

next     hrm-ray solve {puzzle_bundle} {PUZZLE}
         hrm-ray generate {text_bundle} --prompt "A list is" --adaptive
         hrm-ray train --bundle-dir {text_bundle} --resume --steps 2000
         hrm-ray train --dataset-file YOUR_TEXT --dry-run
         hrm-ray train --help
(hrm-ray is in {Path(sys.executable).parent})
""")


def summary(puzzles: dict[str, float], puzzle_minutes: float, text: dict[str, float], text_minutes: float) -> str:
    """What was reached, in figures."""
    exact, by_q = 100 * puzzles["exact_accuracy"], 100 * puzzles["exact_accuracy_q_stop"]
    return f"""
Sudoku   {exact:.1f} % of {puzzles["puzzles"]:.0f} held-out puzzles exactly right at the last segment,
         {by_q:.1f} % when each stops by Q, after {puzzles["steps_q_stop"]:.1f} segments; {puzzle_minutes:.1f} minutes
         (held out means: other solution grids than in training)
Text     {text["bits_per_byte"]:.2f} held-out bits per byte, perplexity {text["perplexity"]:.0f},
         {text["adaptive_loss"] - text["loss"]:+.3f} nats when each token stops by its halting head (after
         {text["mean_segments"]:.2f} segments), in {text_minutes:.1f} minutes
"""


if __name__ == "__main__":
    main()
