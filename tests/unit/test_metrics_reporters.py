"""Reports to Weights & Biases and MLflow: what they are sent, and that their failures end no run.

The libraries themselves are used where they are installed (extras wandb and mlflow); else records go to a scripted one.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hrm_ray.errors import UnavailableError
from hrm_ray.metrics import reporters
from hrm_ray.metrics.reporters import ReportSink, check_reporters, numbers, report_sinks, without_secrets
from hrm_ray.rundir import RunDir, read_json
from hrm_ray.types import Record
from tests.support.runs import TEXT, hrm, records, text_file, train

TRAIN = Record("train", 2, 10.5, {"loss": 2.0, "parts": [1.0, 2.0], "note": "text", "inf": math.inf})
EVAL = Record("eval", 2, 11.0, {"loss": 1.0, "best": True})
SAMPLE = Record("event", 2, 12.0, {"level": "INFO", "message": "sample: ab", "prompt": "a", "sample": "b"})
NOTE = Record("event", 2, 12.0, {"level": "WARNING", "message": "hot"})


class Kept:
    def __init__(self) -> None:
        self.records: list[Record] = []

    def write(self, record: Record) -> None:
        self.records.append(record)

    def close(self) -> None:
        """Nothing is open."""


class FakeWandb(ModuleType):
    """The part of wandb that is used; `calls` is what it was asked for."""

    def __init__(self, calls: list[Any], key: bool = True) -> None:
        super().__init__("wandb")
        self.calls = calls
        self.login = lambda **words: key
        self.Settings = lambda **words: words

    def init(self, **words: Any) -> Any:
        self.calls.append(("init", words))
        return SimpleNamespace(
            id=words["id"] or "new1",
            define_metric=lambda name, step_metric: self.calls.append(("define", name, step_metric)),
            log=lambda values: self.calls.append(("log", values)),
            finish=lambda: self.calls.append(("finish",)),
        )


class FakeMlflow(ModuleType):
    """The part of mlflow that is used."""

    def __init__(self, calls: list[Any], known: bool) -> None:
        super().__init__("mlflow")
        made = SimpleNamespace(
            get_experiment_by_name=lambda name: SimpleNamespace(experiment_id="7") if known else None,
            create_experiment=lambda name: calls.append(("experiment", name)) or "7",
            create_run=lambda e, run_name: (
                calls.append(("run", e, run_name)) or SimpleNamespace(info=SimpleNamespace(run_id="r"))
            ),
            log_batch=lambda run_id, metrics=(), params=(): calls.append(("batch", run_id, [*metrics], [*params])),
            set_tag=lambda run_id, key, value: calls.append(("tag", key, value)),
            set_terminated=lambda run_id: calls.append(("end", run_id)),
        )
        self.MlflowClient = lambda: made
        self.entities = SimpleNamespace(Metric=lambda *parts: parts, Param=lambda *parts: parts)


def no_service() -> Any:
    raise ConnectionError("no route to host")


def sent(name: str, folder: Path, *, resumes: bool = False, config: dict[str, Any] | None = None) -> Kept:
    kept = Kept()
    (sink,) = report_sinks([name], RunDir(folder), config or {"run.seed": 0}, resumes=resumes, others=kept)
    for record in (TRAIN, EVAL, SAMPLE, NOTE):
        sink.write(record)
    sink.close()
    return kept


def test_numbers() -> None:
    assert numbers(TRAIN) == {"train/loss": 2.0, "train/parts/0": 1.0, "train/parts/1": 2.0, "train/inf": math.inf}
    assert numbers(EVAL) == {"eval/loss": 1.0, "eval/best": 1.0}


def test_wandb_gets_settings_metrics_and_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(calls))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert sent("wandb", tmp_path).records == []
    (_, words), *others = calls
    assert (words["project"], words["name"], words["id"]) == ("mine", tmp_path.name, None)
    assert words["config"] == {"run.seed": 0}
    assert others == [
        ("define", "*", "step"),
        ("log", {**numbers(TRAIN), "step": 2}),
        ("log", {"eval/loss": 1.0, "eval/best": 1.0, "step": 2}),
        ("log", {"event": "sample: ab", "step": 2}),
        ("log", {"event": "hot", "step": 2}),
        ("finish",),
    ]
    assert read_json(RunDir(tmp_path).reports) == {"wandb": "new1"}
    sent("wandb", tmp_path, resumes=True)
    assert [call[1]["id"] for call in calls if call[0] == "init"] == [None, "new1"]


@pytest.mark.parametrize("known", [True, False])
def test_mlflow_gets_settings_metrics_and_the_last_sample(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "mlflow", FakeMlflow(calls, known))
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    config = {f"key{number}": number for number in range(150)}
    assert sent("mlflow", tmp_path, config=config).records == []
    started = [("run", "7", tmp_path.name)] if known else [("experiment", "hrm-ray"), ("run", "7", tmp_path.name)]
    assert calls[: len(started)] == started
    first, second, trained, evaluated, *rest = calls[len(started) :]
    assert [len(first[3]), len(second[3])] == [100, 50] and first[3][1] == ("key1", "1")
    assert trained == (
        "batch",
        "r",
        [("train/loss", 2.0, 10500, 2), ("train/parts/0", 1.0, 10500, 2), ("train/parts/1", 2.0, 10500, 2)],
        [],
    )
    assert evaluated[2] == [("eval/loss", 1.0, 11000, 2), ("eval/best", 1.0, 11000, 2)]
    assert rest == [("tag", "sample", "sample: ab"), ("end", "r")]
    calls.clear()
    sent("mlflow", tmp_path, resumes=True)
    assert [call[0] for call in calls] == ["batch", "batch", "tag", "end"], "a resumed run goes on, its settings stay"


@pytest.mark.parametrize("place", ["open", "write", "close"])
def test_a_failing_service_is_one_warning(place: str) -> None:
    """Also: records of later steps are not kept for it."""

    class Failing:
        def __init__(self) -> None:
            self.fail("open")

        def fail(self, now: str) -> None:
            if now == place:
                raise ConnectionError("no route\nto host")

        def write(self, record: Record) -> None:
            self.fail("write")

        def close(self) -> None:
            self.fail("close")

    kept = Kept()
    sink = ReportSink("wandb", Failing, kept)
    sink.write(TRAIN)
    if place != "close":
        sink._thread.join()
    for _ in range(3):
        sink.write(EVAL)
    sink.close()
    (warning,) = kept.records
    assert warning.kind == "event" and warning.values["level"] == "WARNING"
    assert "--report-to wandb: no more reports (ConnectionError: no route to host)" in str(warning.values["message"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at https://me:s3cret@host:5000/api/2.0 (x@y)", "at https://***@host:5000/api/2.0 (x@y)"),
        ("at https://me:s3@cret@host/api", "at https://***@host/api"),
        ("with url: /api?api_key=s3cret&run=7 (timed out)", "with url: /api?api_key=***&run=7 (timed out)"),
        ("'/x?run=7&X-Amz-Signature=s3cret'", "'/x?run=7&X-Amz-Signature=***'"),
        ("no route to host", "no route to host"),
    ],
)
def test_a_warning_shows_no_secret(text: str, shown: str) -> None:
    def failing() -> Any:
        raise ConnectionError(text)

    assert without_secrets(text) == shown
    kept = Kept()
    ReportSink("mlflow", failing, kept).close()
    message = str(kept.records[0].values["message"])
    assert shown in message and "cret" not in message


def test_a_cut_warning_shows_no_secret() -> None:
    """The address is cut off within its password."""

    def failing() -> Any:
        raise ConnectionError("x" * 160 + " https://me:" + 50 * "s3cret" + "@host")

    kept = Kept()
    ReportSink("mlflow", failing, kept).close()
    assert "s3cret" not in str(kept.records[0].values["message"])


def test_a_service_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporters, "CLOSE_WAIT_S", 0.01)
    freed, kept = threading.Event(), Kept()

    def hanging() -> Any:
        freed.wait()
        raise ConnectionError("late")

    sink = ReportSink("mlflow", hanging, kept)
    sink.write(TRAIN)
    sink.close()
    freed.set()
    assert "not sent within" in str(kept.records[0].values["message"]) and len(kept.records) == 1


@pytest.mark.parametrize(
    ("left_s", "waits_s"), [(None, reporters.CLOSE_WAIT_S), (500, reporters.CLOSE_WAIT_S), (20, 20), (-5, 1)]
)
def test_the_end_waits_for_reports_within_max_time(
    left_s: float | None, waits_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a run is killed at the limit of its queue while it waits."""
    asked: list[float | None] = []
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    sink = ReportSink("mlflow", no_service, Kept(), None if left_s is None else 1000.0 + left_s)
    sink._thread.join()
    monkeypatch.setattr(sink._thread, "join", lambda timeout: asked.append(timeout))
    sink.close()
    assert asked == [waits_s]


def test_what_is_missing_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder `wandb` in the working folder, as the library makes one, is not the library."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (tmp_path / "wandb").mkdir()
    with pytest.raises(UnavailableError, match="pip install wandb"):
        check_reporters(["wandb"])
    with pytest.raises(UnavailableError, match="pip install mlflow-skinny"):
        check_reporters(["mlflow"])
    monkeypatch.undo()
    (tmp_path / "wandb.py").write_text("def login(prompt, verify):\n    return False\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(UnavailableError, match="no API key"):
        check_reporters(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_reporters(["wandb"])
    del sys.modules["wandb"]


@pytest.mark.parametrize(
    ("value", "reason"), [("wandb,tensorbord", "'tensorbord' is no service"), ("none,wandb", "none stands alone")]
)
def test_wrong_names(value: str, reason: str, tmp_path: Path) -> None:
    ran = hrm("train", "--dataset-file", text_file(tmp_path), "--report-to", value, "--dry-run")
    assert ran.code == 2 and reason in ran.err


def test_a_run_goes_on_without_its_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    fake = FakeWandb(calls)
    fake.__spec__ = SimpleNamespace(origin="wandb.py")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(fake, "init", lambda **words: (_ for _ in ()).throw(ConnectionError("no network")))
    train(text_file(tmp_path), tmp_path / "b", *TEXT, "--steps", "2", "--report-to", "wandb")
    warnings = [event for event in records(tmp_path / "b", "event") if "no more reports" in event["message"]]
    assert len(warnings) == 1 and "no network" in warnings[0]["message"]


def test_wandb_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(text_file(tmp_path), tmp_path / "b", *TEXT, "--steps", "2", "--report-to", "wandb,tensorboard")
    assert [event for event in records(tmp_path / "b", "event") if "report" in event["message"]] == []
    assert len(list((tmp_path / "b" / "wandb").glob("offline-run-*/*.wandb"))) == 1
    assert read_json(RunDir(tmp_path / "b").reports)["wandb"]


def test_mlflow_itself_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow: Any = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    train(text_file(tmp_path), tmp_path / "b", *TEXT, "--steps", "2", "--report-to", "mlflow")
    stored = mlflow.MlflowClient().get_run(read_json(RunDir(tmp_path / "b").reports)["mlflow"])
    last = records(tmp_path / "b")[-1]
    assert stored.data.metrics["train/loss"] == pytest.approx(last["loss"])
    assert stored.data.params["run.steps"] == "2" and stored.info.status == "FINISHED"
