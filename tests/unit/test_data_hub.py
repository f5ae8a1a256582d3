"""Data sets of the Hub: a folder laid out as one, and a Hub that says no, or is not there."""

from __future__ import annotations

import http.server
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from hrm_ray.data import hub
from hrm_ray.data.chunks import CorpusHead
from hrm_ray.data.corpus import Corpus
from hrm_ray.data.detect import detect
from hrm_ray.data.parts import TextSource, list_parts
from hrm_ray.data.readers import known_rows, read_part
from hrm_ray.data.rows import BadRow
from hrm_ray.errors import DataError, HrmRayError, SettingsError, UnavailableError
from hrm_ray.settings.hub_name import HubName, hub_name
from hrm_ray.settings.profiles import BUNDLE_DIRS
from tests.support.corpora import faults_of, shown, texts_of, write
from tests.support.runs import TEXT, hrm, last_said, refused

LAYOUT = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train-*
  - split: test
    path: en/test-*
- config_name: fr
  data_files: fr/train-*
---
"""


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of two configurations, one of them of two splits and of three files."""
    root = tmp_path_factory.mktemp("repo")
    write(root / "README.md", LAYOUT)
    files = {f"en/train-{number:05d}-of-00003": [f"{number} {row}" for row in range(5)] for number in range(3)}
    files |= {"en/test-00000-of-00001": ["t1", "t2"], "fr/train-00000-of-00001": ["f1 mot", "f2 mot"]}
    for name, texts in files.items():
        path = root / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"n": list(range(len(texts))), "text": texts}), path)
    return root


def test_names() -> None:
    assert hub_name("hf://org/name:en:test") == HubName("org/name", "en", "test")
    assert hub_name("hf://org/name") == HubName("org/name", None, None)
    assert hub_name("hf://org/name::test") == HubName("org/name", None, "test")
    assert hub_name(r"hf://C:\data\x:en") == HubName(r"C:\data\x", "en", None)
    assert hub_name("s3://a/b") is None and hub_name("a.txt") is None
    for address in ("hf://org/name:en:test", "hf://org/name::test", "hf://org/name", "hf://org/name:en"):
        assert str(hub_name(address)) == address


def test_every_file_is_a_part_and_every_row_comes_once(layout: Path) -> None:
    source = TextSource(f"hf://{layout}:en")
    parts = list_parts(source).parts
    assert [part.name for part in parts] == ["train/00000", "train/00001", "train/00002"]
    assert [shown(list(read_part(part, source))) for part in parts] == [
        [f"{number} {row}" for row in range(5)] for number in range(3)
    ]
    assert all(part.stamp and not part.random_access and known_rows(part, source) is None for part in parts)
    tail = list(read_part(parts[1], source, start_row=3))
    assert tail == list(read_part(parts[1], source))[3:] and [row.row for row in tail] == [3, 4]


def test_rows_of_the_card_tell_the_share_that_was_read(layout: Path, tmp_path: Path) -> None:
    """So an epoch's sequences are estimated without reading all of a data set."""
    card = "dataset_info:\n- config_name: en\n  splits:\n  - name: train\n    num_examples: 15\n---\n"
    copied = Path(shutil.copytree(layout, tmp_path / "set"))
    (copied / "README.md").write_text(LAYOUT.removesuffix("---\n") + card)
    for path, share in ((copied, 0.4), (layout, None)):
        source = TextSource(f"hf://{path}:en")
        head = CorpusHead(Corpus(source, list_parts(source).parts, 100, 6), lambda _: None)
        first = next(iter(head))
        assert first.entry.rows == 6 and head.reading.share == share
        whole = head.estimate_text_bytes()
        assert whole == 15 * 3 and len(head.chunks) == (1 if share else 3)


def test_configurations_and_splits(layout: Path) -> None:
    assert texts_of(f"hf://{layout}:en", split="test") == ["t1", "t2"] == texts_of(f"hf://{layout}:en:test")
    assert texts_of(f"hf://{layout}:fr") == ["f1 mot", "f2 mot"]
    assert detect(TextSource(f"hf://{layout}:fr")).task == "lm"


@pytest.mark.parametrize(
    ("rest", "kind", "said"),
    [
        ("", SettingsError, "--dataset-config"),
        (":de", SettingsError, "'de' not found"),
        (":en:valid", DataError, "The splits are: test, train"),
    ],
)
def test_what_is_not_there_is_told(layout: Path, rest: str, kind: type[HrmRayError], said: str) -> None:
    with pytest.raises(kind, match=said):
        list_parts(TextSource(f"hf://{layout}{rest}"))


def test_a_missing_column_lists_those_there_are(layout: Path) -> None:
    assert texts_of(f"hf://{layout}:fr", text_column="body") == ["<end>"]
    assert "it has: n, text" in faults_of(f"hf://{layout}:fr", text_column="body")[0]
    assert texts_of(f"hf://{layout}:fr", text_column="n") == ["<bad>", "<bad>"]


def test_a_file_that_is_damaged_ends_its_part(tmp_path: Path) -> None:
    for number in range(2):
        pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / f"train-{number}.parquet")
    source = TextSource(f"hf://{tmp_path}")
    parts = list_parts(source).parts
    write(tmp_path / "train-1.parquet", b"no longer one")
    assert shown(list(read_part(parts[0], source))) == ["a", "b"]
    (row,) = read_part(parts[1], source)
    assert isinstance(row, BadRow) and row.ends_part and "shard 1" in str(row.fault)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A Hub of this machine that gives the status and the body in this dictionary, and notes what it was asked."""
    said: dict[str, Any] = {"status": 404, "body": b"{}", "asked": []}

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # The library asks for other things of its own.
            if self.path.startswith("/api/datasets"):
                said["asked"].append(self.path)
            self.send_response(said["status"])
            self.end_headers()
            self.wfile.write(said["body"])

        def log_message(self, *words: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{running.server_port}")
        yield said
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "body", "kind", "said"),
    [
        (404, b"", SettingsError, "no such data set"),
        (401, b"", SettingsError, "hf auth login"),
        (500, b"", UnavailableError, "cannot be reached"),
        (200, b"<html>", UnavailableError, "cannot be reached"),
        (200, b'{"no": "sha"}', UnavailableError, "cannot be reached"),
        (200, b'{"id": "org/name"}', UnavailableError, "no revision"),
    ],
)
def test_a_hub_that_says_no(
    answers: dict[str, Any], status: int, body: bytes, kind: type[HrmRayError], said: str
) -> None:
    answers |= {"status": status, "body": body}
    with pytest.raises(kind, match=said):
        list_parts(TextSource("hf://org/name:en"))
    assert answers["asked"] == ["/api/datasets/org/name"], "asked once"


def test_an_id_that_cannot_be_one_is_refused(answers: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="not an id of the Hub"):
        list_parts(TextSource("hf://org/na me?x:en"))
    assert not answers["asked"]


def test_the_revision_is_settled_once_and_read_everywhere(
    answers: dict[str, Any], layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    answers |= {"status": 200, "body": json.dumps({"id": "org/name", "sha": "abc123"}).encode()}
    opened = []

    def builder(path: str, name: str | None, revision: str | None) -> Any:
        opened.append((path, revision))
        return real(str(layout), name)

    real = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    hub._open.cache_clear()
    source = TextSource("hf://org/name:en")
    parts = list_parts(source).parts
    assert shown(list(read_part(parts[2], source)))[0] == "2 0"
    assert opened == [("org/name", "abc123")] and parts[0].stamp == "abc123"
    hub._open.cache_clear()
    list(read_part(parts[0], source))
    assert opened == [("org/name", "abc123")] * 2 and len(answers["asked"]) == 1


def test_without_a_network_there_is_one_message_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    begin = time.monotonic()
    message = refused(3, "train", "--dataset-id", "org/name", "--dry-run", naming=("org/name", "network"))
    assert time.monotonic() - begin < 5 and "hf://org/name" in message


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnavailableError, match="pip install datasets"):
        list_parts(TextSource("hf://org/name"))


def test_a_run_on_a_data_set_goes_on_and_names_its_bundle(
    layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(layout, tmp_path / "sets" / "mine")
    about = ("--dataset-id", "sets/mine", "--dataset-config", "en", "--val-split", "test")
    ran = hrm("train", *last_said((*about, *TEXT, "--max-seq-len", "8", "--steps", "2")))
    assert ran.code == 0, ran.err
    bundle = tmp_path / BUNDLE_DIRS[None] / "mine"
    monkeypatch.chdir(layout)
    again = hrm("train", "--bundle-dir", bundle, "--resume", "--steps", "3", "--launcher", "local")
    assert again.code == 0 and "step 3" in again.out + again.err, again.err
