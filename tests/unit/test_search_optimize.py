"""`hrm-ray optimize` and `train --optimize`: what is found, with how few trials, and what is said and written."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from hrm_ray.errors import SettingsError
from hrm_ray.launch.preflight import PROCESS_BYTES
from hrm_ray.launch.resolve import ResolvedRun, resolve
from hrm_ray.launch.run_directory import load_run
from hrm_ray.search.earlier_searches import file_of
from hrm_ray.search.optimize import (
    CHECKPOINTING,
    CHUNKED,
    EIGHT_BITS,
    Point,
    Search,
    contexts_up_to,
    divisors,
    memory_of,
)
from hrm_ray.search.trial import Verdict
from hrm_ray.settings.tree import RunSettings
from tests.support.runs import TEXT, hrm, last_said, refused, text_file

MB = 1_000_000
Peak = Callable[[Point], float]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory) -> ResolvedRun:
    folder = tmp_path_factory.mktemp("data")
    flat = {
        "--dataset-file": str(text_file(folder)),
        **{"--hidden-size": "32", "--num-heads": "2", "--num-layers": "2", "--vocab-size": "300", "--device": "cpu"},
        **{"--max-seq-len": "1024", "--batch-size": "4", "--gradient-accumulation-steps": "4", "--launcher": "local"},
        **{"--memory-budget": "1GB", "--bundle-dir": str(folder / "b")},
    }
    return resolve(load_run(flat), checks_memory=False)


def point_of(settings: RunSettings) -> Point:
    memory = settings.memory
    levers = {
        EIGHT_BITS: settings.optimizer.use_8bit_optimizer,
        CHECKPOINTING: memory.gradient_checkpointing,
        CHUNKED: memory.use_chunked_training,
    }
    return Point(
        settings.data.max_seq_len,
        settings.optimizer.batch_size,
        tuple(lever for lever, holds in levers.items() if holds),
    )


def simulated(resolved: ResolvedRun, peak: Peak, monkeypatch: pytest.MonkeyPatch, *, off: float = 1.0) -> Search:
    """A search on a device where a point takes these bytes; the estimate of its tensors is `off` by a factor."""
    monkeypatch.setattr(Search, "estimate", lambda self, point: int(off * (peak(point) - PROCESS_BYTES)))

    def tried(settings: RunSettings, limit_bytes: int) -> Verdict:
        taken = round(peak(point_of(settings)))
        return Verdict("fits", taken, 0.1) if taken <= limit_bytes else Verdict("too large")

    return Search(resolved, tried)


def peak_of(state: float, token: float) -> Peak:
    saves = {EIGHT_BITS: (0.7, 1.0), CHECKPOINTING: (1.0, 0.5), CHUNKED: (1.0, 0.4)}

    def peak(point: Point) -> float:
        fixed, of_token = state, token
        for lever in point.levers:
            fixed, of_token = fixed * saves[lever][0], of_token * saves[lever][1]
        return PROCESS_BYTES + fixed + of_token * (point.context or 0) * point.batch_size

    return peak


def test_what_fits_as_asked_takes_one_trial_and_two_for_the_table(
    resolved: ResolvedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = simulated(resolved, peak_of(10 * MB, 1000), monkeypatch).run()
    assert found.point == Point(1024, 16) and len(found.trials) == 3
    assert [trial.point.batch_size for trial in found.speeds()] == [4, 8, 16]


@pytest.mark.parametrize("off", [0.7, 1.0, 1.4])
def test_the_search_is_brute_force_with_fewer_trials(
    off: float, resolved: ResolvedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For random devices: the longest context, then the largest micro-batch, as trying everything finds them."""
    rng, taken = random.Random(3), list[int]()
    for _ in range(20):
        peak = peak_of(rng.uniform(10, 450) * MB, 10 ** rng.uniform(3, 6.3))
        search = simulated(resolved, peak, monkeypatch, off=off)
        if peak(Point(32, 1, (EIGHT_BITS, CHECKPOINTING, CHUNKED))) > 0.9 * search.limit_bytes:
            continue
        found = search.run()
        fits = [point for point in every_point(found.point) if peak(point) <= search.limit_bytes]
        assert found.point.context == max(point.context or 0 for point in fits)
        assert found.point == max(
            (point for point in fits if point.context == found.point.context), key=lambda point: point.batch_size
        )
        shown = [trial for trial in found.speeds() if trial.point.batch_size < found.point.batch_size]
        taken.append(len(found.trials) - len(shown))
    assert len(taken) >= 10 and sum(taken) / len(taken) <= 5
    # Each dimension has its bound; what levers need is beside it.
    assert max(taken) <= 10 + 4 + 3


def every_point(found: Point) -> list[Point]:
    return [Point(context, size, found.levers) for context in contexts_up_to(1024) for size in divisors(16)]


def test_levers_are_added_only_where_the_run_does_not_fit_and_the_fastest_first(
    resolved: ResolvedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = Search(resolved, lambda settings, limit_bytes: Verdict("fits")).limit_bytes
    token = (limit - PROCESS_BYTES) / 1024
    for state, of_token, levers in (
        (1 * MB, 0.9 * token, ()),
        (1 * MB, 1.5 * token, (CHUNKED,)),
        (1 * MB, 4.0 * token, (CHECKPOINTING, CHUNKED)),
        (0.9 * 1024 * token, 0.2 * token, (EIGHT_BITS,)),
    ):
        found = simulated(resolved, peak_of(state, of_token), monkeypatch).run()
        assert (found.point.context, set(found.point.levers)) == (1024, set(levers))
    found = simulated(resolved, peak_of(1 * MB, 8.0 * token), monkeypatch).run()
    assert 608 <= (found.point.context or 0) <= 648 and len(found.trials) <= 6


def test_a_lever_that_the_user_has_decided_about_is_not_pulled(
    resolved: ResolvedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    given = resolved.settings.model_copy(
        update={"given": frozenset({"memory.gradient_checkpointing", "memory.use_chunked_training"})}
    )
    search = Search(replace(resolved, settings=given), lambda settings, limit_bytes: Verdict("fits"))
    assert not {CHECKPOINTING, CHUNKED} & set(search.levers())


def words(tmp_path: Path, *more: object) -> list[object]:
    small = last_said((*TEXT, "--device", "cpu", "--max-seq-len", "64", "--steps", "2", "--memory-budget", "600MB"))
    return ["--dataset-file", text_file(tmp_path, rows=200), *small, "--gradient-accumulation-steps", "2", *more]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    """Trials are simulated: more than two rows of 64 do not fit. Gives what was tried."""
    points: list[Point] = []

    def trial(settings: RunSettings, limit_bytes: int) -> Verdict:
        point = point_of(settings)
        points.append(point)
        rows = point.batch_size * (point.context or 0)
        return Verdict("fits", 500 * MB + rows, 0.01 * rows) if rows <= 128 else Verdict("too large", why="no room")

    monkeypatch.setattr("hrm_ray.search.trial.run_trial", trial)
    monkeypatch.setattr(Search, "estimate", lambda self, point: point.batch_size * (point.context or 1))
    return points


def test_the_command_prints_trials_table_and_options_and_its_file_trains(
    tmp_path: Path, tried: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o.yaml"
    ran = hrm("optimize", *words(tmp_path), "--out", out)
    assert ran.code == 0, ran.err
    assert "trial 1 context 64, batch 8: too large (no room)" in ran.out
    assert "found   context 64, batch 2" in ran.out and "batch   4 x 2 -> 2 x 4: the effective batch stays 8" in ran.out
    assert "--batch-size 2 --gradient-accumulation-steps 4" in ran.out and "tokens/s" in ran.out
    content = yaml.safe_load(out.read_text())
    assert content["optimizer"] == {"batch_size": 2, "gradient_accumulation_steps": 4}
    assert content["memory"]["memory_budget"] == "600MB" and content["data"]["max_seq_len"] == 64
    trained = hrm("train", "--config", out, "--bundle-dir", tmp_path / "b")
    assert trained.code == 0 and "batch   2 x 4 accumulated" in trained.out, trained.err
    # The same again: what was found before is confirmed by one trial, and our own file is replaced.
    before = len(tried)
    again = hrm("optimize", *words(tmp_path), "--out", out)
    assert again.code == 0 and len(tried) == before + 1 and "one trial confirms it" in again.out
    assert again.out.splitlines()[-4:] == ran.out.splitlines()[-4:]
    # Where it does not fit any more, the search is made anew.
    monkeypatch.setattr(
        "hrm_ray.search.trial.run_trial",
        lambda settings, limit_bytes: Verdict("fits" if settings.optimizer.batch_size == 1 else "too large", 1, 0.1),
    )
    anew = hrm("optimize", *words(tmp_path), "--out", out)
    assert anew.code == 0 and "searching anew" in anew.out and "found   context 64, batch 1" in anew.out


def test_train_with_optimize_trains_with_what_was_found(tmp_path: Path, tried: list[Point]) -> None:
    ran = hrm("train", *words(tmp_path), "--optimize", "--bundle-dir", tmp_path / "b")
    assert ran.code == 0, ran.err
    assert "batch   2 x 4 accumulated x 1 worker(s) = 8" in ran.out and "finished at step 2" in ran.out


def test_with_auto_resume_the_first_run_searches_and_later_ones_go_on(tmp_path: Path, tried: list[Point]) -> None:
    more = ("--optimize", "--auto-resume", "--bundle-dir", tmp_path / "b")
    first = hrm("train", *words(tmp_path), *more)
    assert first.code == 0 and "batch   2 x 4 accumulated" in first.out, first.err
    before = len(tried)
    # The words of the command are those of the first run, though another size was found then.
    again = hrm("train", *last_said([*words(tmp_path), *more, "--steps", "3"]))
    assert again.code == 0 and "nothing is searched" in again.out, again.err
    assert "batch   2 x 4 accumulated" in again.out and "finished at step 3" in again.out and len(tried) == before


def test_what_the_user_has_refused_is_another_search(resolved: ResolvedRun) -> None:
    from dataclasses import replace

    def file(*given: str) -> Path:
        settings = resolved.settings.model_copy(update={"given": frozenset(given)})
        return file_of(Search(replace(resolved, settings=settings), lambda settings, limit_bytes: Verdict("fits")))

    every = [file(), *(file(key) for lever in (EIGHT_BITS, CHECKPOINTING, CHUNKED) for key in lever.leaves)]
    # Both leaves of chunked training decide about it alike.
    assert len(set(every)) == 4
    assert file("run.steps", "optimizer.lr") == every[0]


def test_a_cluster_from_the_environment_is_refused(resolved: ResolvedRun) -> None:
    from dataclasses import replace

    devices = replace(resolved.devices, ray_address="1.2.3.4:5")
    with pytest.raises(SettingsError, match=r"the cluster at 1\.2\.3\.4:5: trials run on this machine"):
        Search(replace(resolved, devices=devices), lambda settings, limit_bytes: Verdict("fits"))


def test_only_the_gpus_of_the_run_are_asked_and_in_another_process(
    resolved: ResolvedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    def asked(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1,3"
        said = [["GPU", 5_000_000_000, 8_000_000_000], ["GPU", 1_000_000_000, 8_000_000_000]]
        return subprocess.CompletedProcess(command, 0, f"a note\n{json.dumps(said)}\n", "")

    monkeypatch.setattr("subprocess.run", asked)
    monkeypatch.setattr("torch.cuda._lazy_init", lambda: pytest.fail("CUDA was initialised here"))
    settings = resolved.settings.with_leaves({"memory.memory_budget": "3GB"})
    for workers, memory in ((1, 3_000_000_000), (2, 1_000_000_000)):
        devices = replace(resolved.devices, device="cuda", world_size=workers, visible_gpus="1,3")
        run = replace(resolved, settings=settings, devices=devices)
        assert memory_of(run) == memory
        assert file_of(Search(run, lambda settings, limit_bytes: Verdict("fits"))).suffix == ".json"


@pytest.mark.parametrize(
    ("more", "naming"),
    [
        (("--resume",), ("no run",)),
        (("--ray-address", "1.2.3.4:5", "--launcher", "ray"), ("--ray-address 1.2.3.4:5", "on this machine")),
        (("--out", "FOLDER"), ("--out", "is a folder")),
        (("--out", "FOLDER/none/o.yaml"), ("--out", "no folder")),
        (("--out", "FOLDER/corpus.txt"), ("--out", "which no search wrote")),
        (("--memory-budge", "1GB"), ("--memory-budge", "--memory-budget")),
        (("--parallel-independent", "--batch-size", "2,1", "--world-size", "2", "--launcher", "subprocess"), ("2,1",)),
    ],
)
def test_what_cannot_be_searched_is_refused(
    more: tuple[str, ...], naming: tuple[str, ...], tmp_path: Path, tried: list[Point]
) -> None:
    said = last_said([*words(tmp_path), *(word.replace("FOLDER", str(tmp_path)) for word in more)])
    refused(2, "optimize", *said, naming=naming)
    assert not tried


def test_a_dry_run_makes_no_trials(tmp_path: Path, tried: list[Point]) -> None:
    refused(2, "train", *words(tmp_path), "--optimize", "--dry-run", naming=("--optimize with --dry-run",))
    assert not tried


def test_nothing_fits(tmp_path: Path, tried: list[Point], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hrm_ray.search.trial.run_trial", lambda settings, limit_bytes: Verdict("too large"))
    message = refused(4, "optimize", *words(tmp_path), "--out", tmp_path / "o.yaml", naming=("memory", "not even"))
    assert len(message) < 300 and not (tmp_path / "o.yaml").exists()


def test_an_interrupt_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(settings: RunSettings, limit_bytes: int) -> Verdict:
        raise KeyboardInterrupt

    monkeypatch.setattr("hrm_ray.search.trial.run_trial", interrupted)
    ran = hrm("optimize", *words(tmp_path), "--out", tmp_path / "o.yaml")
    assert ran.code == 130 and not (tmp_path / "o.yaml").exists() and "Traceback" not in ran.err
