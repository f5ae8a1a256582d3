"""`hrm-ray submit` and `hrm-ray stop` against a stand-in for Ray's client: what is sent, refused, and how they end."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import AuthenticationError

from hrm_ray.errors import SettingsError, UnavailableError
from hrm_ray.launch import job_package
from hrm_ray.launch.job_package import code_package, job_options
from hrm_ray.orchestration import jobs
from hrm_ray.rundir import RunDir
from tests.support.runs import TEXT, hrm, refused, text_file, train

HEAD = "http://10.0.0.1:8265"
SECRET = "hf_VERY_SECRET"
GOOD = ("train", "--dataset-file", "/mnt/corpus", "--bundle-dir", "/mnt/bundles/docs")


class Client:
    """As ray.job_submission.JobSubmissionClient, on scripted answers."""

    version = ray.__version__
    error: BaseException | None = None
    log: tuple[Any, ...] = ("one\n", "two\n")
    """What each connection to the log gives: texts, and errors that end it."""
    ends: dict[str, Any] = {"status": "SUCCEEDED", "driver_exit_code": 0}  # noqa: RUF012
    listed: tuple[Any, ...] = ()
    made: list[Client] = []  # noqa: RUF012

    def __init__(self, address: str) -> None:
        assert address == HEAD
        if isinstance(self.error, AuthenticationError):
            raise self.error
        self._server_ray_version = self.version
        self.stopped: list[str] = []
        self.connections = 0
        self.sent: dict[str, str] = {}
        self.sent_as = ""
        Client.made.append(self)

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: Any, metadata: Any) -> None:
        if self.error is not None:
            raise self.error
        self.entrypoint, self.name, self.sent_as, self.metadata = entrypoint, submission_id, submission_id, metadata
        self.environment = runtime_env["env_vars"]
        folder = Path(runtime_env["working_dir"])
        self.sent = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        parts = self.log[self.connections] if isinstance(self.log[0], tuple) else self.log
        self.connections += 1
        for part in parts:
            if isinstance(part, BaseException):
                raise part
            yield part

    def get_job_info(self, name: str) -> Any:
        return SimpleNamespace(**{"message": "", "driver_exit_code": None, **self.ends})

    def list_jobs(self) -> list[Any]:
        submitted = [{"submission_id": self.sent_as, "status": "RUNNING", "metadata": {}}] if self.sent_as else []
        return [SimpleNamespace(**each) for each in (*self.listed, *submitted)]

    def stop_job(self, name: str) -> bool:
        self.stopped.append(name)
        return True


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout with the files that a job needs, and some that it does not."""
    root = tmp_path / "checkout"
    for name in ("hrm_ray/__init__.py", "jobs/train.py", "tests/fixtures.bin", "pyproject.toml", ".gitignore"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("data/\n" if name == ".gitignore" else "# " + name)
    git(root, "init", "-q")
    git(root, "add", "-A")
    (root / "data").mkdir()
    (root / "data" / "corpus.txt").write_text("ignored")
    (root / "notes.txt").write_text("not tracked")
    return root


def git(root: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=root, check=True, capture_output=True)


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch, checkout: Path) -> type[Client]:
    monkeypatch.chdir(checkout)
    for name, value in (("error", None), ("made", []), ("listed", (RUNNING,)), ("version", ray.__version__)):
        monkeypatch.setattr(Client, name, value)
    monkeypatch.setattr(jobs, "JobSubmissionClient", Client)
    monkeypatch.setattr(jobs, "_check_answers", lambda address: None)
    monkeypatch.setattr(jobs, "POLL_S", 0.0)
    return Client


def submit(*words: object) -> Any:
    return hrm("submit", "--address", HEAD, *words)


def test_the_code_goes_and_the_exit_code_comes(
    head: type[Client], checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "hrm_ray" / "__init__.py").write_text("# changed")
    (checkout / "hrm_ray" / "new.py").write_text("# new")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("OTHER", "other")
    ran = submit("--env", "HF_TOKEN", "--", *GOOD, "--sample-prompt", "two words; $HOME", "--no-moe")
    (client,) = head.made
    assert ran.code == 0 and "one\ntwo\n" in ran.out and "has ended with exit code 0" in ran.out
    assert "3 files of" in ran.out and "1 Python file(s) are not in git" in ran.err
    assert client.sent["hrm_ray/__init__.py"] == "# changed" and set(client.sent) == {
        *("hrm_ray/__init__.py", "jobs/train.py", "pyproject.toml")
    }
    assert shlex.split(client.entrypoint)[:2] == ["python", "jobs/train.py"]
    assert "--sample-prompt=two words; $HOME" in shlex.split(client.entrypoint)
    assert "--no-moe" in shlex.split(client.entrypoint)
    assert client.environment == {
        "RAY_JOB_STOP_WAIT_TIME_S": "600",
        "PYTHONUNBUFFERED": "1",
        "HF_TOKEN": SECRET,
    }
    assert client.metadata == {jobs.BUNDLE: "/mnt/bundles/docs"} and client.name.startswith("docs-")
    assert SECRET not in ran.out + ran.err + client.entrypoint + json.dumps(client.metadata)


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ({"status": "FAILED", "driver_exit_code": 2}, 2),
        ({"status": "FAILED", "driver_exit_code": 4}, 4),
        ({"status": "FAILED", "driver_exit_code": 75}, 75),
        ({"status": "FAILED", "driver_exit_code": -9}, 1),
        ({"status": "FAILED"}, 1),
        ({"status": "STOPPED"}, 75),
        ({"status": "SUCCEEDED"}, 0),
    ],
)
def test_the_exit_code_is_the_runs_own(ends: dict[str, Any], code: int, head: type[Client], monkeypatch: Any) -> None:
    monkeypatch.setattr(head, "ends", ends)
    assert submit("--", *GOOD).code == submit("--follow", "docs-1").code == code


def test_a_lost_connection_is_taken_up_without_repeating(head: type[Client], monkeypatch: Any) -> None:
    monkeypatch.setattr(head, "log", (("one\n", "tw", RuntimeError("closed")), ("one\ntwo\n", "three\n")))
    ran = submit("--follow", "docs-1")
    assert ran.code == 0 and ran.out.startswith("one\ntwo\nthree\n") and ran.out.count("one") == 1


def test_a_reader_that_is_gone_is_no_lost_head(head: type[Client]) -> None:
    def write(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        jobs.Jobs(HEAD).follow("docs-1", write)
    assert head.made[0].connections == 1


def test_a_head_that_is_lost_is_told(head: type[Client], monkeypatch: Any) -> None:
    monkeypatch.setattr(jobs, "LOST_TIMEOUT_S", -1.0)
    monkeypatch.setattr(head, "log", (ConnectionError("gone"),))
    ran = submit("--follow", "docs-1")
    assert ran.code == 3 and f"submit --address {HEAD} --follow docs-1" in ran.err and ran.err.count("\n") == 1


def test_ctrl_c_leaves_the_job_alone(head: type[Client], monkeypatch: Any) -> None:
    monkeypatch.setattr(head, "log", ("one\n", KeyboardInterrupt()))
    ran = submit("--name", "docs-1", "--", *GOOD)
    assert ran.code == 130 and head.made[0].stopped == []
    assert f"hrm-ray submit --address {HEAD} --follow docs-1" in ran.out
    assert f"hrm-ray stop docs-1 --address {HEAD}" in ran.out


def test_following_what_is_not_there(head: type[Client], monkeypatch: Any) -> None:
    refused(2, "submit", "--address", HEAD, "--follow", "docs-2", naming=("--follow docs-2", "no such job"))
    monkeypatch.setattr(head, "log", (RuntimeError("Request failed with status code 404: Job docs-1 does not exist."),))
    ran = submit("--follow", "docs-1")
    assert ran.code == 3 and "job docs-1 is lost" in ran.err and "Submit it again" in ran.err


def test_names_of_jobs(head: type[Client]) -> None:
    refused(2, "submit", "--address", HEAD, "--name", "a/b", "--", *GOOD, naming=("--name a/b", "letters"))
    assert submit("--", *GOOD, "--bundle-dir", "/mnt/my docs").code == 0
    assert head.made[0].name.startswith("my-docs-")


def test_without_waiting(head: type[Client]) -> None:
    ran = submit("--no-wait", "--", *GOOD, "--optimize", "--dry-run")
    assert shlex.split(head.made[0].entrypoint)[-2:] == ["--optimize", "--dry-run"]
    assert ran.code == 0 and head.made[0].connections == 0 and "--follow docs-" in ran.out


@pytest.mark.parametrize(
    ("words", "naming"),
    [
        (("train", "--dataset-file", "/mnt/c"), ("--bundle-dir", "absolute path")),
        (("train", "--dataset-file", "/mnt/c", "--bundle-dir", "out"), ("--bundle-dir out", "absolute path")),
        (("train", "--dataset-file", "corpus", "--save-dir", "/mnt/b"), ("--dataset-file corpus", "an address")),
        ((*GOOD, "--log-file", "log.jsonl"), ("--log-file log.jsonl",)),
        ((*GOOD, "--tokenizer-path", "notes.txt"), ("--tokenizer-path notes.txt", "on this machine")),
        ((*GOOD, "--no-such-option"), ("--no-such-option", "is not an option")),
        ((*GOOD, "--lr", "fast"), ("--lr fast",)),
        ((*GOOD, "--strategy", "single", "--world-size", "2"), ("--strategy single", "one worker")),
        ((*GOOD, "stray"), ("stray", "belongs to no option")),
        (("evaluate", "/mnt/b"), ("only train",)),
        ((), ("only train",)),
    ],
)
def test_wrong_words_are_refused_before_anything(words: Any, naming: Any, head: type[Client]) -> None:
    message = refused(2, "submit", "--address", HEAD, "--", *words, naming=naming)
    assert len(message) < 300 and head.made == []


def test_settings_of_a_run_on_the_cluster_are_not_judged_here(head: type[Client]) -> None:
    """The run to resume may have several workers, or another strategy."""
    assert submit("--", *GOOD, "--resume", "--strategy", "single", "--world-size", "2").code == 0


def test_wrong_variables_show_no_value(head: type[Client]) -> None:
    for word in (f"HF_TOKEN={SECRET}", "NOT_SET_HERE"):
        message = refused(2, "submit", "--address", HEAD, "--env", word, "--", *GOOD, naming=("--env",))
        assert SECRET not in message
    assert head.made == []


def test_own_files_go_with_the_code(head: type[Client], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("optimizer:\n  lr: 0.001\n")
    assert submit("--", *GOOD, "--config", config).code == 0
    assert head.made[0].sent[".job/config/run.yaml"] == config.read_text()
    assert "--config=.job/config/run.yaml" in shlex.split(head.made[0].entrypoint)
    assert submit("--", *GOOD, "--config", "sudoku4").code == 0  # a recipe is in the code
    assert "--config=sudoku4" in shlex.split(head.made[1].entrypoint)


def test_a_package_that_is_too_large_names_its_largest_files(head: type[Client], checkout: Path) -> None:
    for number in range(6):
        with (checkout / f"weights-{number}-of-a-large-model.bin").open("wb") as file:
            file.truncate((100 - number) * 2**20)
    assert submit("--", *GOOD).code == 0  # git does not track them
    git(checkout, "add", "-N", ".")
    naming = ("90 MiB", *(f"{number}-of-a-large-model.bin 0.1 GB" for number in range(5)))
    message = refused(4, "submit", "--address", HEAD, "--", *GOOD, naming=naming)
    assert "5-of" not in message and len(message) < 300 and len(head.made) == 1


def test_without_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, head: type[Client]) -> None:
    monkeypatch.chdir(tmp_path)
    here = code_package(tmp_path)  # that of the command itself
    assert "hrm_ray/__main__.py" in here.files and not [name for name in here.files if name.startswith("tests/")]
    monkeypatch.setattr(job_package.hrm_ray, "__path__", [str(tmp_path)])
    refused(3, "submit", "--address", HEAD, "--", *GOOD, naming=("the code", "git checkout"))


def test_what_the_head_refuses(head: type[Client], monkeypatch: Any) -> None:
    for error, code, words in (
        (RuntimeError("Job with submission_id docs-1 already exists"), 2, "--name docs-1"),
        (RuntimeError("Request failed with status code 413: too large"), 4, "larger than the head takes"),
        (RuntimeError("Request failed with status code 500: oh"), 3, "was not accepted"),
        (AuthenticationError("no token"), 3, "RAY_AUTH_MODE=token"),
    ):
        monkeypatch.setattr(head, "error", error)
        message = refused(code, "submit", "--address", HEAD, "--name", "docs-1", "--", *GOOD, naming=(words,))
        assert len(message) < 300


def test_another_ray_on_the_cluster(head: type[Client], monkeypatch: Any) -> None:
    monkeypatch.setattr(head, "version", "2.9.3")
    refused(3, "submit", "--address", HEAD, "--", *GOOD, naming=("Ray 2.9.3 is there", ray.__version__))


class OtherServer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def other_server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), OtherServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_addresses_of_no_head(monkeypatch: pytest.MonkeyPatch, checkout: Path, other_server: str) -> None:
    monkeypatch.chdir(checkout)
    for address, code, words in (
        ("10.0.0.1:8265", 2, "is not the address of a web server"),
        ("ray://10.0.0.1:10001", 2, "is not the address of a web server"),
        ("http://10.0.0.1:x", 2, "is not the address of a web server"),
        ("http://127.0.0.1:1", 3, "nothing answers there"),
        (other_server, 3, "is not the job server of a Ray head"),
    ):
        message = refused(code, "submit", "--address", address, "--", *GOOD, naming=(f"--address {address}", words))
        assert len(message) < 300


RUNNING = {"submission_id": "docs-1", "status": "RUNNING", "metadata": {jobs.BUNDLE: "/mnt/bundles/docs"}}
OTHERS = (
    {"submission_id": "docs-0", "status": "SUCCEEDED", "metadata": {jobs.BUNDLE: "/mnt/bundles/docs"}},
    {"submission_id": None, "status": "RUNNING", "metadata": None},
    {"submission_id": "else", "status": "RUNNING", "metadata": None},
)


@pytest.mark.parametrize("target", ["docs-1", "/mnt/bundles/docs"])
def test_stop_waits_for_the_end_of_a_job(target: str, head: type[Client], monkeypatch: Any) -> None:
    monkeypatch.setattr(head, "listed", (*OTHERS, RUNNING))
    answers = iter([{"status": "RUNNING"}, {"status": "RUNNING"}, {"status": "STOPPED", "message": "was stopped"}])
    monkeypatch.setattr(head, "get_job_info", lambda self, name: SimpleNamespace(**{"message": "", **next(answers)}))
    ran = hrm("stop", target, "--address", HEAD)
    assert ran.code == 0 and head.made[0].stopped == ["docs-1"] and "has ended: was stopped" in ran.out
    assert next(answers, None) is None


def test_stop_of_what_is_not_there(head: type[Client], monkeypatch: Any) -> None:
    monkeypatch.setattr(head, "listed", (*OTHERS, RUNNING))
    refused(2, "stop", "docs-0", "--address", HEAD, naming=("docs-0", "has ended", "else, docs-1"))
    refused(2, "stop", "nothing", "--address", HEAD, naming=("nothing", "no job", "else, docs-1"))
    refused(2, "stop", "docs-1", "--wait", "soon", naming=("--wait soon", "duration"))
    monkeypatch.setattr(head, "ends", {"status": "RUNNING"})
    with pytest.raises(UnavailableError, match="still runs after 0 s"):
        jobs.Jobs(HEAD).stop("docs-1", 0.0)


HOLDER = """
import json, signal, sys
from pathlib import Path
from filelock import FileLock
root = Path(sys.argv[1])
lock = FileLock(root / ".run.lock")
lock.acquire()
(root / ".in_use.json").write_text(json.dumps({"host": sys.argv[2], "pid": __import__("os").getpid()}))
signal.signal(signal.SIGTERM, lambda *_: ((root / "saved").touch(), sys.exit(75)))  # It has no checkpoint.
print("holds", flush=True)
signal.pause()
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_stop_of_a_run_on_this_machine(tmp_path: Path) -> None:
    root = RunDir(tmp_path / "b").root
    refused(2, "stop", root, naming=(root, "no such folder", "--address"))
    root.mkdir()
    refused(2, "stop", root, naming=(root, "no run is training in it"))
    for host, code in (("elsewhere", 3), (socket.gethostname(), 1)):
        process = subprocess.Popen([sys.executable, "-c", HOLDER, root, host], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "holds\n"
        ran = hrm("stop", root)
        assert ran.code == code, ran
        if code == 3:
            assert "process is on elsewhere" in ran.err and not (root / "saved").exists()
            process.terminate()
        assert process.wait() == 75
        if code == 3:
            (root / "saved").unlink()
    trained = RunDir(tmp_path / "trained").root
    train(text_file(tmp_path), trained, *TEXT, "--steps", "1")
    command = [sys.executable, "-c", HOLDER, trained, socket.gethostname()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "holds\n"
        said = hrm("stop", trained)
    assert said.code == 0 and "newest checkpoint is step_1" in said.out and "--resume" in said.out
    assert (root / "saved").exists() and "has saved no checkpoint" in ran.err and "--resume" not in ran.out


PLACES = st.one_of(
    st.sampled_from(["/mnt/x", "s3://bucket/x", "hf://org/name", "C:\\data\\x", "\\\\host\\share\\x"]).map(
        lambda x: (x, True)
    ),
    st.from_regex(r"[a-z.][a-z/.]{0,8}", fullmatch=True).map(lambda x: (x, False)),
)


@settings(max_examples=15, deadline=None)
@given(PLACES, PLACES)
def test_only_places_of_the_cluster_are_taken(data: tuple[str, bool], bundle: tuple[str, bool]) -> None:
    given_options = {"--dataset-file": data[0], "--bundle-dir": bundle[0]}
    if data[1] and bundle[1]:
        found, files, place = job_options(given_options, None)
        assert found == given_options and files == {} and place == bundle[0]
        return
    with pytest.raises(SettingsError) as refused_places:
        job_options(given_options, None)
    assert len(refused_places.value.faults) == (not data[1]) + (not bundle[1])
