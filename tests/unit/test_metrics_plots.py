"""Plots: a PNG of several runs, faults that name what is wrong, and the chart in text."""

from __future__ import annotations

import json
import math
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.errors import DataError, SettingsError, UnavailableError
from hrm_ray.metrics import plots
from hrm_ray.metrics.jsonl import JsonlSink
from hrm_ray.metrics.plots import plot_runs
from hrm_ray.metrics.text_chart import loss_chart
from hrm_ray.types import Record


def _bundle(folder: Path, steps: int = 60, figure: str = "bits_per_byte", scale: float = 4.0) -> Path:
    sink = JsonlSink(folder / "metrics.jsonl")
    for step in range(1, steps + 1):
        loss = math.nan if step == 30 else 1.0 + scale * math.exp(-step / 20)
        sink.write(Record("train", step, float(step), {"loss": loss, "lr": 1e-3 * min(1.0, step / 10)}))
        if step % 20 == 0:
            sink.write(Record("eval", step, float(step), {"loss": 1.1 + scale * math.exp(-step / 20), figure: 0.5}))
    sink.write(Record("event", steps, float(steps), {"level": "INFO", "message": "done"}))
    sink.close()
    return folder


def _panel_titles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the metric of each panel as it is drawn."""
    drawn: list[str] = []
    real = plots._draw_panel

    def spy(axes: object, runs: object, metric: str) -> None:
        drawn.append(metric)
        real(axes, runs, metric)  # type: ignore[arg-type]

    monkeypatch.setattr(plots, "_draw_panel", spy)
    return drawn


def test_png_of_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = _panel_titles(monkeypatch)
    runs = [_bundle(tmp_path / "_text $x_$"), _bundle(tmp_path / "sudoku", figure="exact_accuracy") / "metrics.jsonl"]
    out = tmp_path / "new folder" / "curves.png"
    assert plot_runs(runs, out) == out
    header = out.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", header[16:24])
    assert width > 1000
    assert height > 400
    assert drawn == ["loss", "bits_per_byte", "exact_accuracy", "lr"]
    assert [file.name for file in out.parent.iterdir()] == ["curves.png"]
    assert "matplotlib.pyplot" not in sys.modules  # no global state, no display


def test_panels_only_for_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = _panel_titles(monkeypatch)
    run = _bundle(tmp_path / "run", steps=5)
    plot_runs([run], tmp_path / "a.png")
    assert drawn == ["loss", "lr"]
    drawn.clear()
    plot_runs([run], tmp_path / "a.png", metrics=["lr", "lr"])
    assert drawn == ["lr"]


def test_curves_hold_the_records_numbers(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    runs = plots._load([_bundle(tmp_path / "run")])
    axes = Figure().add_subplot()
    plots._draw_panel(axes, runs, "loss")
    raw, smooth, held_out = axes.get_lines()
    steps, values = (np.asarray(axis) for axis in raw.get_data())
    assert steps.tolist() == list(range(1, 61))
    assert np.isnan(values[29])
    assert values[0] == 1.0 + 4.0 * math.exp(-1 / 20)
    # three records a point: the mean of the two that are there beside the gap
    assert np.asarray(smooth.get_ydata())[29] == pytest.approx((values[28] + values[30]) / 2, rel=1e-12)
    assert np.asarray(held_out.get_xdata()).tolist() == [20, 40, 60]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["train, smoothed (each record faint)", "held out"]


def test_a_wide_range_is_drawn_on_a_log_scale(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    for scale, expected in ((4.0, "linear"), (400.0, "log")):
        axes = Figure().add_subplot()
        plots._draw_panel(axes, plots._load([_bundle(tmp_path / expected, steps=150, scale=scale)]), "loss")
        assert axes.get_yscale() == expected


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    paths = [_bundle(tmp_path / "one" / "run"), _bundle(tmp_path / "two" / "run") / "metrics.jsonl"]
    assert [run.name for run in plots._load(paths)] == ["one/run", "two/run"]
    assert [run.name for run in plots._load(paths[:1])] == ["run"]


def test_many_runs_have_colours_of_their_own(tmp_path: Path) -> None:
    runs = [_bundle(tmp_path / f"run{index}", steps=2) for index in range(12)]
    assert len({run.colour for run in plots._load(runs)}) == 12
    plot_runs(runs, tmp_path / "many.png", ["loss"])


def test_all_that_is_wrong_with_runs_is_told_at_once_and_the_old_plot_stays(tmp_path: Path) -> None:
    out = tmp_path / "plot.png"
    out.write_bytes(b"old")
    (tmp_path / "empty").mkdir()
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "metrics.jsonl").touch()
    (tmp_path / "bad.jsonl").write_text("not json\n", encoding="utf-8")
    runs = [tmp_path / name for name in ("nowhere", "empty", "fresh", "bad.jsonl")]
    with pytest.raises(SettingsError) as caught:
        plot_runs(runs, out)
    reasons = ["no such run", "has no metrics.jsonl", "no train or eval records", "not a metrics record"]
    for fault, run, reason in zip(caught.value.faults, runs, reasons, strict=True):
        assert str(run) in fault.value
        assert reason in fault.reason
        assert fault.hint
    assert out.read_bytes() == b"old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.jsonl", "empty", "fresh", "plot.png"]


def test_a_run_without_records_is_a_fault_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no metrics.jsonl"):
        plot_runs([tmp_path / "empty"], tmp_path / "plot.png")


def test_unknown_metric_is_a_fault_that_names_the_known(tmp_path: Path) -> None:
    run = _bundle(tmp_path / "run")
    with pytest.raises(SettingsError, match=r"perplexity: no run has this metric.*bits_per_byte, loss, lr"):
        plot_runs([run], tmp_path / "a.png", ["loss", "perplexity"])
    assert not (tmp_path / "a.png").exists()


def test_bad_usage(tmp_path: Path) -> None:
    run = _bundle(tmp_path / "run")
    with pytest.raises(SettingsError, match="none given"):
        plot_runs([], tmp_path / "a.png")
    for out in (tmp_path / "a.pdf", run):
        with pytest.raises(SettingsError, match=r"ends in \.png"):
            plot_runs([run], out)


def test_missing_matplotlib_is_an_environment_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnavailableError, match="pip install matplotlib"):
        plot_runs([_bundle(tmp_path / "run")], tmp_path / "a.png")


def _losses(values: list[float]) -> list[Record]:
    return [Record("train", 10 * (index + 1), 1.0, {"loss": value}) for index, value in enumerate(values)]


def test_text_chart_of_a_falling_line() -> None:
    chart = loss_chart(_losses([4.0, 3.0, 2.0, 1.0]), width=24, height=4, encoding="ascii")
    assert chart.splitlines() == [
        "        4 |#:.",
        "          |####:..",
        "      2.5 |########:.",
        "        1 |###########:.",
        "          +-------------",
        "           10   step  40",
    ]


def test_text_chart_in_blocks_where_the_encoding_carries_them() -> None:
    records = _losses([4.0, 3.0, 2.0, 1.0])
    assert "\u2588" in loss_chart(records, 40, encoding="utf-8")
    # cp437 has the full block and the lines, but not the eighths
    for encoding in ("ascii", "latin-1", "cp1252", "cp437"):
        assert loss_chart(records, 40, encoding=encoding).isascii()


@settings(max_examples=80, deadline=None)
@given(
    losses=st.lists(st.floats(0, 1e30) | st.sampled_from([math.nan, math.inf]), max_size=200),
    width=st.integers(0, 120),
    height=st.integers(2, 12),
)
def test_text_chart_keeps_its_size(losses: list[float], width: int, height: int) -> None:
    lines = loss_chart(_losses(losses), width, height, "utf-8").splitlines()
    if any(math.isfinite(loss) for loss in losses):
        assert len(lines) == height + 2
        assert max(map(len, lines)) <= max(width, 24)
        assert lines[-1].split() == ["10", "step", str(10 * len(losses))] or not all(map(math.isfinite, losses))
    else:
        assert lines == ["no finite train loss recorded"]


def test_text_chart_leaves_held_out_records_out() -> None:
    assert loss_chart([Record("eval", 1, 1.0, {"loss": 1.0})], 40) == "no finite train loss recorded"


def test_a_run_of_version_0_1_is_drawn_under_todays_names(tmp_path: Path) -> None:
    """Its held-out loss compares with what was `lm_loss`; the whole objective has a panel of its own."""
    bundle = Path(__file__).parents[1] / "fixtures" / "bundles_0_1" / "text"
    lines = [json.loads(line) for line in (bundle / "metrics.jsonl").read_text().splitlines()]
    (run,) = plots._load([bundle])
    for name, stored in (("loss", "lm_loss"), ("objective", "loss"), ("token_accuracy", "accuracy")):
        assert run.series("train", name)[1].tolist() == [line[stored] for line in lines if line["kind"] == "train"]
    assert plot_runs([bundle], tmp_path / "old.png", ["loss", "objective"]).is_file()
