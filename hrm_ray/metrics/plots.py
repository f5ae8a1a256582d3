"""Loss curves of several runs as a PNG; matplotlib is imported only when one is drawn, and no display is needed."""

from __future__ import annotations

import colorsys
import math
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
"""Okabe and Ito's palette for colour-blind readers (jfly.uni-koeln.de/color), without yellow."""

_LABELS = {
    "loss": "loss (nats)",
    "objective": "objective (all loss terms)",
    "segment_loss": "loss of all segments (nats)",
    "act_steps": "segments per puzzle",
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
"""Set, not measured, so drawn without smoothing."""

_HELD_OUT_FIGURES = ("bits_per_byte", "exact_accuracy")


@dataclass(frozen=True)
class _Run:
    """One run's records, with its name and colour in the legend."""

    name: str
    colour: str
    records: list[Record]

    def series(self, kind: RecordKind, metric: str) -> tuple[Floats, Floats]:
        """Steps and values of a metric; values that are not finite become gaps."""
        points = [(float(record.step), value) for record in self.records for value in _numbers(record, kind, metric)]
        return np.array([step for step, _ in points]), np.array([value for _, value in points])

    def has(self, kind: RecordKind, metric: str) -> bool:
        return any(_numbers(record, kind, metric) for record in self.records)


def plot_runs(runs: list[Path], out: Path, metrics: list[str] | None = None) -> Path:
    """Draw the runs into one PNG at `out`, and return `out`.

    A run is a folder with metrics.jsonl, or such a file. Without `metrics` there is a panel each for the loss (train
    raw and smoothed, evaluation as points), bits per byte or exact accuracy, and the learning rate; with it, a panel
    for each metric named.

    SettingsError: no runs, a run that does not exist, a metric that no run has, or `out` is not a .png. DataError: a
    run has no train or eval records. UnavailableError: no matplotlib.
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
    """The runs. Raises everything that is wrong with them: SettingsError if a path does not exist, else DataError."""
    faults: list[Fault] = []
    runs: list[_Run] = []
    names = _names(paths)
    for index, (path, name) in enumerate(zip(paths, names, strict=True)):
        file = RunDir(path).metrics if path.is_dir() else path
        if not file.is_file():
            reason = f"the folder has no {file.name}" if path.is_dir() else "there is no such run"
            faults.append(Fault(str(path), reason, "Name a bundle folder of hrm-ray train, or its metrics.jsonl"))
            continue
        try:
            records = [record for record in read_records(file) if record.kind != "event"]
        except DataError as error:
            faults.extend(error.faults)
            continue
        if not records:
            faults.append(
                Fault(str(file), "the run has no train or eval records", "Train it for some steps, or leave it out")
            )
        colour = _COLOURS[index % len(_COLOURS)]
        if len(paths) > len(_COLOURS):
            # More runs than colours: evenly spaced hues.
            red, green, blue = colorsys.hsv_to_rgb(index / len(paths), 0.85, 0.55 + 0.3 * (index % 2))
            colour = f"#{round(255 * red):02X}{round(255 * green):02X}{round(255 * blue):02X}"
        runs.append(_Run(name, colour, records))
    if faults:
        raise DataError(faults) if all(path.exists() for path in paths) else SettingsError(faults)
    return runs


def _names(paths: Sequence[Path]) -> list[str]:
    """For each run the shortest end of its path that no other run shares."""
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
        name
        for run in runs
        for record in run.records
        for name, value in record.values.items()
        if isinstance(value, (int, float))
    }
    if metrics is None:
        wanted = [name for name in ("loss", *_HELD_OUT_FIGURES, "lr") if name in known]
        if wanted:
            return wanted
        raise DataError(Fault("loss", "no run has this metric", f"They have: {', '.join(sorted(known))}"))
    missing = [name for name in metrics if name not in known]
    if missing or not metrics:
        value = f"--metric {', '.join(missing)}".rstrip()
        raise SettingsError(Fault(value, "no run has this metric", f"They have: {', '.join(sorted(known))}"))
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
        # Set afterwards: a label that starts with "_" would be dropped, and "$" would start a formula.
        text.set_parse_math(False)
        text.set_text(run.name)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_panel(axes: Axes, runs: Sequence[_Run], metric: str) -> None:
    """One metric of all runs: train as lines, evaluation as points."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    drawn: list[Floats] = []
    styles: dict[str, Artist] = {}
    for behind, run in zip(reversed(range(len(runs))), runs, strict=True):
        steps, values = run.series("train", metric)
        if steps.size:
            drawn.append(values)
            # About a thirtieth of all records, an odd number; fewer than 20 are not smoothed.
            width = 1 if metric in _EXACT or values.size < 20 else max(3, values.size // 30 | 1)
            if width > 1:
                axes.plot(steps, values, color=run.colour, alpha=0.35, linewidth=0.8)
                (line,) = axes.plot(steps, _moving_mean(values, width), color=run.colour, linewidth=1.8)
                styles["train, smoothed (each record faint)"] = line
            else:
                marker = "." if values.size < 3 else ""
                # Schedules are often equal: those drawn first are wider, so that they show behind the later ones.
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
    # From the first to the last record of all runs, with a margin: the same for all panels.
    recorded = [record.step for run in runs for record in run.records]
    margin = max(0.02 * (max(recorded) - min(recorded)), 0.5)
    axes.set_xlim(min(recorded) - margin, max(recorded) + margin)
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
    """The metric of this record, as a list of zero or one; not finite becomes NaN, a gap in a line."""
    if record.kind != kind or metric not in record.values:
        return []
    value = record.values[metric]
    if not isinstance(value, (int, float)):
        return []
    return [float(value) if math.isfinite(value) else math.nan]


def _moving_mean(values: Floats, width: int) -> Floats:
    """Centred mean over `width` values (odd), over fewer at both ends and around gaps."""
    there = np.isfinite(values)
    kernel = np.ones(width)
    half = width // 2
    sums = np.convolve(np.where(there, values, 0.0), kernel)[half : half + values.size]
    counts = np.convolve(there.astype(np.float64), kernel)[half : half + values.size]
    # Counts are whole numbers up to convolve's rounding: below a half, the window is empty.
    return np.where(counts > 0.5, sums / np.maximum(counts, 1.0), np.nan)


def _spans_decades(values: Floats) -> bool:
    """Whether positive values span more than a factor of 20, a few outliers aside."""
    finite = values[np.isfinite(values)]
    if finite.size == 0 or finite.min() <= 0:
        return False
    low, high = np.percentile(finite, [2, 98])
    return bool(high / low > 20)
