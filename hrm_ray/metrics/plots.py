"""Loss curves of finished or running runs: a PNG of several side by side, and a small chart in text.

One job: draw what the records say. It imports matplotlib only when a PNG is asked for, and no display is needed.
"""

from __future__ import annotations

import colorsys
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hrm_ray.atomic_files import atomic_write
from hrm_ray.errors import DataError, Fault, SettingsError, UnavailableError
from hrm_ray.metrics.jsonl import read_records
from hrm_ray.rundir import RunDir
from hrm_ray.types import Record, RecordKind

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

Floats = npt.NDArray[np.float64]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
"""Okabe and Ito's palette, told apart by colour-blind readers too (jfly.uni-koeln.de/color), yellow left out."""

_LABELS = {
    "loss": "loss (nats)",
    "lr": "learning rate",
    "bits_per_byte": "bits per byte",
    "exact_accuracy": "exact accuracy",
    "exact_accuracy_q_stop": "exact accuracy, stopping by Q",
    "token_accuracy": "token accuracy",
    "cell_accuracy": "cell accuracy",
    "grad_norm": "gradient norm (unclipped)",
    "mean_segments": "segments per sample",
    "memory_gb": "memory (GB)",
    "tokens_per_s": "tokens per second",
    "samples_per_s": "samples per second",
}
_EXACT = frozenset({"lr"})
"""Set, not measured: drawn as it is, never smoothed."""

_CHART_MARGIN = 9
"""Cells for a number beside the text chart: what any positive one takes at three digits, as in 1.23e-100."""

_HELD_OUT_FIGURES = ("bits_per_byte", "exact_accuracy")


@dataclass(frozen=True)
class _Run:
    """One run's records under the name that its legend entry bears."""

    name: str
    colour: str
    records: list[Record]

    def series(self, kind: RecordKind, metric: str) -> tuple[Floats, Floats]:
        """Steps and values of a metric; numbers that are not finite stay in as gaps."""
        metric = self._shown(kind, metric)
        points = [(float(record.step), value) for record in self.records for value in _numbers(record, kind, metric)]
        return np.array([step for step, _ in points]), np.array([value for _, value in points])

    def has(self, kind: RecordKind, metric: str) -> bool:
        metric = self._shown(kind, metric)
        return any(_numbers(record, kind, metric) for record in self.records)

    def _shown(self, kind: RecordKind, metric: str) -> str:
        """Training's `loss` holds the halting loss too; beside the held-out loss stands what is the same: lm_loss."""
        if (kind, metric) == ("train", "loss") and any(_numbers(record, kind, "lm_loss") for record in self.records):
            return "lm_loss"
        return metric


def plot_runs(runs: list[Path], out: Path, metrics: list[str] | None = None) -> Path:
    """Draw the runs into one PNG at `out`, and return `out`.

    A run is a folder that holds metrics.jsonl, or such a file. Without `metrics` there is a panel each for the loss
    (train raw and smoothed, held-out points), the held-out figure (bits per byte, exact accuracy, whichever there is)
    and the learning rate; with it, a panel for each metric named. The file appears whole or not at all.

    SettingsError: no runs, or `out` is no .png. DataError: no such run, a run without train or eval records, a metric
    that no run has. UnavailableError: no matplotlib.
    """
    if not runs:
        raise SettingsError(Fault("runs", "none given", "Name at least one bundle folder or metrics.jsonl file"))
    if out.suffix.lower() != ".png" or out.is_dir():
        raise SettingsError(Fault(str(out), "plots are written as one PNG file", "Name a file that ends in .png"))
    loaded = _load(runs)
    data = _draw(loaded, _panels(loaded, metrics))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out) as file:
            file.write(data)
    except OSError as error:
        reason = f"it cannot be written ({error.strerror})"
        raise SettingsError(Fault(str(out), reason, "Give --out a place that can be written")) from error
    return out


def _load(paths: Sequence[Path]) -> list[_Run]:
    """Every run, or all that is wrong with them at once."""
    faults: list[Fault] = []
    runs: list[_Run] = []
    names = _names(paths)
    for index, (path, name) in enumerate(zip(paths, names, strict=True)):
        file = RunDir(path).metrics if path.is_dir() else path
        if not file.is_file():
            reason = f"the folder holds no {file.name}" if path.is_dir() else "there is no such run"
            faults.append(Fault(str(path), reason, "Name a bundle folder of hrm-ray train, or its metrics.jsonl"))
            continue
        try:
            records = [record for record in read_records(file) if record.kind != "event"]
        except DataError as error:
            faults.extend(error.faults)
            continue
        if not records:
            faults.append(
                Fault(str(file), "it has no train or eval records", "Train the run for some steps, or leave it out")
            )
        runs.append(_Run(name, _colour(index, len(paths)), records))
    if faults:
        raise DataError(faults)
    return runs


def _colour(index: int, runs: int) -> str:
    """A run's colour; past the palette's end hues evenly apart take its place, so that none comes twice."""
    if runs <= len(_COLOURS):
        return _COLOURS[index]
    red, green, blue = colorsys.hsv_to_rgb(index / runs, 0.85, 0.55 + 0.3 * (index % 2))
    return f"#{round(255 * red):02X}{round(255 * green):02X}{round(255 * blue):02X}"


def _names(paths: Sequence[Path]) -> list[str]:
    """For each run the shortest end of its folder's path that no other run shares; a file may be told by its name."""
    parts = [
        (path.parent if path == RunDir(path.parent).metrics else path.with_suffix("") if path.is_file() else path)
        .absolute()
        .parts
        for path in paths
    ]
    depth = 1
    while depth < max(map(len, parts)) and len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _panels(runs: Sequence[_Run], metrics: list[str] | None) -> list[str]:
    """The metric of each panel."""
    known = {
        name for run in runs for record in run.records for name, value in record.values.items() if _is_number(value)
    }
    if metrics is None:
        wanted = [name for name in ("loss", *_HELD_OUT_FIGURES, "lr") if name in known]
        if wanted:
            return wanted
        metrics = ["loss"]
    missing = [name for name in metrics if name not in known]
    if missing or not metrics:
        value = ", ".join(missing) or "metrics"
        raise DataError(Fault(value, "none of the runs has such figures", f"They have: {', '.join(sorted(known))}"))
    return list(dict.fromkeys(metrics))


def _draw(runs: Sequence[_Run], panels: Sequence[str]) -> bytes:
    """The PNG's bytes."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise UnavailableError(
            Fault("matplotlib", f"needed for plots and not importable ({error})", "Run pip install matplotlib")
        ) from error
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    legend_rows = math.ceil(len(runs) / (3 * columns))
    size = (1.2 + 4.8 * columns, 0.4 + 3.6 * rows + 0.25 * legend_rows)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    for index, metric in enumerate(panels):
        _draw_panel(figure.add_subplot(rows, columns, index + 1), runs, metric)
    handles = [Line2D([], [], color=run.colour, linewidth=3) for run in runs]
    legend = figure.legend(
        handles, ["run"] * len(runs), loc="outside lower center", ncols=min(len(runs), 3 * columns), frameon=False
    )
    for text, run in zip(legend.get_texts(), runs, strict=True):
        # Set afterwards: a label that starts with "_" would be dropped, and "$" in one would be read as a formula.
        text.set_parse_math(False)
        text.set_text(run.name)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_panel(axes: Axes, runs: Sequence[_Run], metric: str) -> None:
    """One metric of all runs: train as lines, held-out as points."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    drawn: list[Floats] = []
    styles: dict[str, Artist] = {}
    for behind, run in zip(reversed(range(len(runs))), runs, strict=True):
        steps, values = run.series("train", metric)
        if steps.size:
            drawn.append(values)
            width = _smoothing_width(values.size) if metric not in _EXACT else 1
            if width > 1:
                axes.plot(steps, values, color=run.colour, alpha=0.35, linewidth=0.8)
                (line,) = axes.plot(steps, _moving_mean(values, width), color=run.colour, linewidth=1.8)
                styles["train, smoothed (each record faint)"] = line
            else:
                marker = "." if values.size < 3 else ""
                # Schedules are often the same: those drawn first are wider, so that they show behind the later ones.
                thickness = 1.8 + (5.0 * behind / len(runs) if metric in _EXACT else 0.0)
                (line,) = axes.plot(steps, values, color=run.colour, linewidth=thickness, marker=marker)
                styles["train"] = line
        steps, values = run.series("eval", metric)
        if steps.size:
            drawn.append(values)
            (line,) = axes.plot(
                steps, values, color=run.colour, linestyle="--", linewidth=0.9, marker="o", markersize=5,
                markeredgecolor="white", markeredgewidth=0.8, zorder=3,
            )  # fmt: skip
            styles["held out"] = line
    axes.set_title(_LABELS.get(metric, metric.replace("_", " ")), fontsize=11)
    # One extent for all panels, so that they can be read across.
    axes.set_xlim(*_extent(runs))
    axes.set_xlabel("step (weight updates)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if "accuracy" in metric:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(-0.03, 1.03)
    elif metric == "lr":
        axes.ticklabel_format(axis="y", style="scientific", scilimits=(-3, 4))
        axes.set_ylim(bottom=0)
    elif _spans_decades(np.concatenate(drawn)):
        axes.set_yscale("log")
        axes.set_ylabel("log scale", fontsize=8)
    if metric not in _EXACT:
        key = axes.legend(styles.values(), styles.keys(), fontsize=8, frameon=True, framealpha=0.85, edgecolor="none")
        for handle in key.legend_handles:
            if handle is not None:
                handle.set(color="#444444")


def _numbers(record: Record, kind: RecordKind, metric: str) -> list[float]:
    """The metric of this record as a list of none or one; what is not finite becomes NaN, a gap in a line."""
    if record.kind != kind or metric not in record.values:
        return []
    value = record.values[metric]
    if not isinstance(value, (int, float)):
        return []
    return [float(value) if math.isfinite(value) else math.nan]


def _extent(runs: Sequence[_Run]) -> tuple[float, float]:
    """The steps from the first to the last record of all runs, with a margin."""
    steps = [record.step for run in runs for record in run.records]
    margin = max(0.02 * (max(steps) - min(steps)), 0.5)
    return min(steps) - margin, max(steps) + margin


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _smoothing_width(points: int) -> int:
    """How many records a smoothed point averages: about a thirtieth of all, odd; few records are not smoothed."""
    return 1 if points < 20 else max(3, points // 30 | 1)


def _moving_mean(values: Floats, width: int) -> Floats:
    """Centred mean over `width` values (odd), over fewer at both ends and around gaps; no lag, unlike a running one."""
    there = np.isfinite(values)
    kernel = np.ones(width)
    half = width // 2
    sums = np.convolve(np.where(there, values, 0.0), kernel)[half : half + values.size]
    counts = np.convolve(there.astype(np.float64), kernel)[half : half + values.size]
    # Counts are whole numbers up to convolve's rounding: below a half there is nothing to average.
    return np.where(counts > 0.5, sums / np.maximum(counts, 1.0), np.nan)


def _spans_decades(values: Floats) -> bool:
    """Whether positive values reach over a factor of 20, a few outliers aside."""
    finite = values[np.isfinite(values)]
    if finite.size == 0 or finite.min() <= 0:
        return False
    low, high = np.percentile(finite, [2, 98])
    return bool(high / low > 20)


def loss_sparkline(records: Sequence[Record], width: int, height: int = 8, encoding: str | None = None) -> str:
    """The train loss as a chart of text, at most `width` cells wide (but no less than 24) and `height` + 2 lines high.

    A column is the mean of the finite losses of its span of steps; the numbers at the side are those of the highest,
    the middle and the lowest column. Drawn in eighth blocks, or in ASCII when `encoding` (None: that of sys.stdout)
    cannot carry them. Without any finite loss it is one line that says so.
    """
    points = [(record.step, loss) for record in records for loss in _numbers(record, "train", "loss")]
    finite = [(step, loss) for step, loss in points if not math.isnan(loss)]
    if not finite:
        return "no finite train loss recorded"
    steps, losses = (np.array(column, dtype=np.float64) for column in zip(*finite, strict=True))
    columns = max(width, 24) - _CHART_MARGIN - 2
    means = _column_means(steps, losses, columns)
    low, high = float(means.min()), float(means.max())
    glyphs, side, corner, floor = _chart_glyphs(encoding)
    parts = len(glyphs) - 1  # how many levels a cell can show
    span = high - low
    # The lowest column still shows one part, so that no column looks missing; a flat curve lies in the middle.
    scaled = (means - low) / span if span > 0 else np.full(columns, 0.5)
    levels = 1 + np.rint(scaled * (height * parts - 1)).astype(int)
    labels = {0: high, height // 2: (low + high) / 2, height - 1: low} if span > 0 else {height // 2: low}
    lines = []
    for row in range(height):
        label = f"{labels[row]:.3g}" if row in labels else ""
        filled = np.clip(levels - (height - 1 - row) * parts, 0, parts)
        lines.append(f"{label:>{_CHART_MARGIN}} {side}{''.join(glyphs[part] for part in filled)}".rstrip())
    first, last = f"{int(steps.min())}", f"{int(steps.max())}"
    lines.append(" " * (_CHART_MARGIN + 1) + corner + floor * columns)
    lines.append(" " * (_CHART_MARGIN + 2) + first + "step".center(columns - len(first) - len(last)) + last)
    return "\n".join(lines)


def _column_means(steps: Floats, losses: Floats, columns: int) -> Floats:
    """The mean loss of each column's equal span of steps; a column without a record lies between its neighbours."""
    span = max(float(steps.max() - steps.min()), 1.0)
    places = np.minimum(((steps - steps.min()) / span * columns).astype(np.int64), columns - 1)
    counts = np.bincount(places, minlength=columns)
    sums = np.bincount(places, weights=losses, minlength=columns)
    filled = np.flatnonzero(counts)
    return np.interp(np.arange(columns), filled, sums[filled] / counts[filled])


def _chart_glyphs(encoding: str | None) -> tuple[str, str, str, str]:
    """A cell's fillings from empty to full, then the side, the corner and the floor of the axes."""
    blocks = (" \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588", "\u2502", "\u2514", "\u2500")
    try:
        "".join(blocks).encode(encoding or sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return " .:#", "|", "+", "-"
    return blocks
