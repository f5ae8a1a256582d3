"""Names of tokenizers: paths, ids of the Hub out of its cache, from a Hub on loopback, and with none to be reached."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from hrm_ray.data.bpe import train_bpe
from hrm_ray.data.named_tokenizer import absolute_name, load_named
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.errors import DataError, SettingsError, UnavailableError

SHA = "0" * 39 + "1"
TOKENIZER = train_bpe(["a tokenizer of the Hub, the Hub"] * 3, 270, 9)


def cached(cache: Path, hub_id: str, files: dict[str, bytes]) -> Path:
    """A repository as the Hub's cache keeps it."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SHA)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)
    return snapshot


def files_of(tokenizer: TextTokenizer, folder: Path) -> dict[str, bytes]:
    tokenizer.save(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of a Hub that must not be asked."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_an_id_is_found_in_the_cache_without_a_network(cache: Path, tmp_path: Path) -> None:
    cached(cache, "org/name", files_of(TOKENIZER, tmp_path / "t"))
    cached(cache, "name-1.5", files_of(TOKENIZER, tmp_path / "t"))
    for hub_id in ("org/name", "name-1.5"):
        assert load_named(hub_id).fingerprint == TOKENIZER.fingerprint


def test_a_cached_tokenizer_without_tokenizer_json_goes_through_transformers(cache: Path, tmp_path: Path) -> None:
    """As older repositories have it: GPT-2's vocab.json and merges.txt."""
    model = json.loads(TOKENIZER._backend.to_str())["model"]
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"])
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    files = {
        "vocab.json": json.dumps(model["vocab"]).encode(),
        "merges.txt": merges.encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "config.json": b'{"model_type": "gpt2"}',
    }
    cached(cache, "org/old", files)
    text = "the Hub's"
    assert load_named("org/old").encode(text).tolist() == TOKENIZER.encode(text).tolist()


def test_what_is_not_in_the_cache_is_told_at_once_offline(cache: Path) -> None:
    cached(cache, "org/weights", {"config.json": b"{}", "model.safetensors": b"large"})
    for hub_id in ("org/weights", "gpt2"):
        with pytest.raises(UnavailableError, match=f"^{hub_id}: no such path.*HF_HUB_OFFLINE"):
            load_named(hub_id)


def test_a_damaged_file_in_the_cache_is_told_under_the_id(cache: Path) -> None:
    cached(cache, "org/name", {"tokenizer.json": b"{"})
    with pytest.raises(DataError, match=r"^org/name \(in .*tokenizer\.json\)"):
        load_named("org/name")


@pytest.mark.parametrize("name", ["/no/where", "./tok", "a/b/c", "nothing.json", "~/nothing at all", "-x", "ends--a/"])
def test_what_cannot_be_an_id_is_a_path(cache: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="no such file or folder"):
        load_named(name)
    assert Path(absolute_name(name)).is_absolute()


def test_names_that_look_like_ids_but_are_none(cache: Path) -> None:
    with pytest.raises(SettingsError, match="nor a Hub id"):
        load_named("a--b")


def test_a_path_that_is_there_is_no_id(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(cache, "org/name", {"tokenizer.json": b"not this one"})
    TOKENIZER.save(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert load_named("org/name").fingerprint == TOKENIZER.fingerprint
    assert absolute_name("org/name") == str(tmp_path / "org" / "name")
    assert absolute_name("org/other") == "org/other"
    assert load_named(str(tmp_path / "org" / "name" / "tokenizer.json")).vocab_size == 270


class RunMonitor(BaseHTTPRequestHandler):
    """The two answers of the Hub that a download needs; `org/slow` never answers, others are not there."""

    files: dict[str, bytes]
    leave = threading.Event()

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/org/slow"):
            self.leave.wait(60)
        elif self.path.startswith("/api/models/org/name"):
            held = [{"rfilename": name} for name in (*self.files, "model.safetensors")]
            self._answer(json.dumps({"id": "org/name", "sha": SHA, "siblings": held}).encode())
        elif self.path.startswith("/api/models/org/weights"):
            held = [{"rfilename": "model.safetensors"}]
            self._answer(json.dumps({"id": "org/weights", "sha": SHA, "siblings": held}).encode())
        elif self.path.rpartition("/")[0] == "/org/name/resolve/main":
            name = self.path.rpartition("/")[2]
            self._answer(self.files[name], {"ETag": f'"{name}"', "X-Repo-Commit": SHA})
        else:
            self.send_response(401)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET

    def _answer(self, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    RunMonitor.files = files_of(TOKENIZER, tmp_path / "t")
    RunMonitor.leave.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), RunMonitor)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    RunMonitor.leave.set()
    server.shutdown()
    server.server_close()


TRY = """
import sys
from hrm_ray.data import named_tokenizer
from hrm_ray.errors import HrmRayError
named_tokenizer._TIMEOUT_S = 0.2
for name in sys.argv[1:]:
    try:
        print(named_tokenizer.load_named(name).fingerprint)
    except HrmRayError as error:
        print(type(error).__name__, str(error).replace("\\n", " "))
"""


def tried(home: Path, names: list[str], **environment: str) -> list[str]:
    """What each name gives in a process of its own, since the Hub's library reads its environment once."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**known, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", **environment}
    command = [sys.executable, "-c", TRY, *names]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=Path.cwd())
    return ran.stdout.splitlines()


def test_an_id_is_fetched_from_the_hub_once_and_faults_come_within_seconds(hub: str, tmp_path: Path) -> None:
    begun = time.monotonic()
    names = ["org/name", "org/weights", "org/none", "org/slow"]
    fetched, weights, absent, slow = tried(tmp_path / "home", names, HF_ENDPOINT=hub)
    assert fetched == TOKENIZER.fingerprint
    assert weights.startswith("SettingsError org/weights: ") and "contains no tokenizer" in weights
    assert absent.startswith("SettingsError org/none: ") and "no such repository" in absent
    assert slow.startswith("UnavailableError org/slow: ") and "the Hub cannot be reached" in slow
    assert time.monotonic() - begun < 20, "no minutes of retries"
    assert not list((tmp_path / "home").rglob("*.safetensors")), "weights are never fetched"
    again, unknown = tried(tmp_path / "home", ["org/name", "org/none"], HF_HUB_OFFLINE="1")
    assert again == TOKENIZER.fingerprint and "HF_HUB_OFFLINE" in unknown


def test_with_no_network_an_id_ends_within_seconds(tmp_path: Path) -> None:
    begun = time.monotonic()
    (refused,) = tried(tmp_path / "home", ["org/name"], HF_ENDPOINT="http://127.0.0.1:9")
    assert refused.startswith("UnavailableError org/name: ") and "cannot be reached" in refused
    assert time.monotonic() - begun < 10
