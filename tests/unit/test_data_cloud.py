"""Corpora in the cloud, on a real S3 server of this machine."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow.fs
import pytest
from moto.server import ThreadedMotoServer

from hrm_ray.data import cloud
from hrm_ray.data.detect import detect
from hrm_ray.data.file_systems import absolute, name_for_runs
from hrm_ray.data.parts import TextSource, list_parts
from hrm_ray.data.readers import known_rows, read_part
from hrm_ray.data.rows import BadRow
from hrm_ray.errors import DataError, HrmRayError, SettingsError, UnavailableError
from tests.support.corpora import COMPRESSIONS, FORMATS, faults_of, rows_of, shown, texts_of, write_tar, write_zip
from tests.support.runs import TEXT, hrm

TEXTS = [f"text {number}" for number in range(7)]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server with the bucket `data`; its address."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    address = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        yield address
    running.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty bucket, with the server named by the environment."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    made = boto3.resource("s3", endpoint_url=server, region_name="us-east-1").Bucket("data")
    made.create()
    yield made
    made.objects.all().delete()
    made.delete()


def put(bucket: Any, **files: bytes) -> None:
    for name, content in files.items():
        bucket.put_object(Key=name, Body=content)


@pytest.mark.parametrize("compression", ["", "gz", "zst"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_file_of_every_format(bucket: Any, form: str, compression: str) -> None:
    content = FORMATS[form](TEXTS)
    name = f"a.{form}.{compression}" if compression else f"a.{form}"
    put(bucket, **{f"deep/{name}": COMPRESSIONS[compression](content) if compression else content})
    source = TextSource(f"s3://data/deep/{name}")
    (part,) = list_parts(source).parts
    assert (part.name, part.address) == (name, source.path) and part.bytes > 0 and part.stamp
    whole = list(read_part(part, source))
    assert shown(whole) == TEXTS and part.random_access == (not compression and form != "json")
    if part.random_access:
        assert shown(list(read_part(part, source, 5, whole[4].mark))) == TEXTS[5:]
    assert known_rows(part, source) == (7 if name == "a.parquet" else None)


def test_folders_splits_and_patterns(bucket: Any) -> None:
    jsonl = {f"c/{split}/{n}.jsonl": FORMATS["jsonl"]([f"{split} {n}"]) for split in ("train", "test") for n in (1, 2)}
    put(bucket, **jsonl, **{"c/a.png": b"", "c/.hidden.txt": b"no", "c/test/b.txt": b"b", "d/other.txt": b"d"})
    assert texts_of("s3://data/c") == ["train 1", "train 2"] == texts_of("s3://data/c/")
    assert texts_of("s3://data/c", split="test") == ["test 1", "test 2", "b"]
    assert list_parts(TextSource("s3://data/c")).skipped == 2
    assert [part.name for part in list_parts(TextSource("s3://data/c")).parts] == ["train/1.jsonl", "train/2.jsonl"]
    assert texts_of("s3://data/c/t*/1.jsonl", split="test") == ["test 1"]
    assert texts_of("s3://data/**/[a-b]?txt", split="c") == ["b"]
    assert texts_of("s3://data/c/*/*.txt", split="test") == ["b"]
    assert texts_of("s3://data/c/test/*.jsonl") == ["test 1", "test 2"]
    with pytest.raises(DataError, match="The splits are: test, train"):
        list_parts(TextSource("s3://data/c", "valid"))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.txt", "a.txt ab.txt [x].txt"),
        ("?.txt", "a.txt"),
        ("**/*.txt", "a.txt ab.txt [x].txt d/a.txt d/e/f.txt"),
        ("d/**", "d/a.txt d/e/f.txt d/b.md"),
        ("[!a]*", "[x].txt"),
        ("[[]x].txt", "[x].txt"),
        ("d/?.[mt]*", "d/a.txt d/b.md"),
        ("d/e", ""),
    ],
)
def test_patterns_are_those_of_paths(pattern: str, names: str) -> None:
    every = ["a.txt", "ab.txt", "[x].txt", "d/a.txt", "d/e/f.txt", "d/b.md"]
    assert [name for name in every if cloud._regex(pattern).fullmatch(name)] == names.split()


def test_archives_are_read_where_they_are(bucket: Any, tmp_path: Path) -> None:
    members = {"test.txt": b"t", **{f"{number}.txt": text.encode() for number, text in enumerate(TEXTS)}}
    for name, write in (("a.zip", write_zip), ("a.tar", write_tar), ("a.tar.gz", write_tar)):
        bucket.upload_file(str(write(tmp_path / name, members)), name)
        assert texts_of(f"s3://data/{name}", split="test") == ["t"]
        # The first member of the tars is of a split, and there is none of the name "train".
        assert texts_of(f"s3://data/{name}", apart="test") == (TEXTS if name == "a.zip" else ["<end>"])
        assert texts_of(f"s3://data/{name}", split="3") == [TEXTS[3]]


@pytest.mark.parametrize(
    ("address", "kind", "said"),
    [
        ("s3://data/none.txt", SettingsError, "nothing exists at this address"),
        ("s3://no-such-bucket/a.txt", HrmRayError, "no-such-bucket"),
        ("s3://data/*.txt", SettingsError, "no file matches"),
        ("s3:///a.txt", SettingsError, "has no bucket"),
        ("s3://data/a.docx", DataError, "`.docx` cannot be read"),
        ("ftp://data/a.txt", SettingsError, "`ftp://` addresses are not supported"),
        ("az://data/a.txt", UnavailableError, "AZURE_STORAGE_ACCOUNT_NAME"),
    ],
)
def test_what_is_not_there_is_told(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, address: str, kind: type[HrmRayError], said: str
) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    put(bucket, **{"a.docx": b""})
    with pytest.raises(kind, match=said):
        list_parts(TextSource(address))


def test_a_server_that_does_not_answer_is_the_environment_s_fault(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put(bucket, **{"a.jsonl": FORMATS["jsonl"](TEXTS)})
    source = TextSource("s3://data/a.jsonl")
    (part,) = list_parts(source).parts
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    begin = time.monotonic()
    with pytest.raises(UnavailableError, match="cannot be read from the cloud") as caught:
        list_parts(source)
    assert len(caught.value.faults) == 1 and "\n" not in str(caught.value)
    with pytest.raises(UnavailableError):
        list(read_part(part, source))
    assert time.monotonic() - begin < 20


def test_a_file_that_vanishes_is_the_data_s_fault(bucket: Any) -> None:
    put(bucket, **{"a.jsonl": FORMATS["jsonl"](TEXTS)})
    source = TextSource("s3://data/a.jsonl")
    (part,) = list_parts(source).parts
    put(bucket, **{"a.jsonl": FORMATS["jsonl"](TEXTS[:2])})
    assert "when the files were listed" in str(next(read_part(part, source)).fault)  # type: ignore[union-attr]
    bucket.Object("a.jsonl").delete()
    (row,) = read_part(part, source)
    assert isinstance(row, BadRow) and row.ends_part and "is gone" in str(row.fault)


def test_a_long_file_is_read_in_pieces(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud, "_BUFFER_BYTES", 1 << 16)
    texts = [f"{number} " * 200 for number in range(1000)]
    put(bucket, **{"a.jsonl": FORMATS["jsonl"](texts), "b.parquet": FORMATS["parquet"](texts[:100])})
    assert texts_of("s3://data/a.jsonl") == texts
    assert texts_of("s3://data/b.parquet") == texts[:100]


def test_bad_rows_name_the_address(bucket: Any) -> None:
    put(bucket, **{"x/a.jsonl": b'{"text": "a"}\nnope\n', "x/b.csv": b"body\nb\n"})
    assert shown(rows_of("s3://data/x")) == ["a", "<bad>", "<end>"]
    first, second = faults_of("s3://data/x")
    assert first.startswith("s3://data/x/a.jsonl:2: ") and "s3://data/x/b.csv, column `text`" in second


def test_another_library_takes_the_place_of_a_missing_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe({"/data/a.txt": b"a", "/data/b/c.jsonl": FORMATS["jsonl"](["c"])})
    monkeypatch.setattr(fsspec, "filesystem", lambda scheme: files)
    monkeypatch.delattr(pyarrow.fs, "GcsFileSystem")
    cloud._file_system.cache_clear()
    assert texts_of("gs://data") == ["a", "c"]
    cloud._file_system.cache_clear()

    def missing(scheme: str) -> None:
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(UnavailableError, match="pip install gcsfs"):
        texts_of("gs://data")


def test_addresses_are_left_as_they_are() -> None:
    for address in ("s3://data/a/b.jsonl.gz", "hf://org/name:en:train", "gs://b/*/x.txt"):
        assert absolute(address) == address
    names = {
        "s3://data/a/corpus.jsonl.gz": "corpus",
        "s3://data": "data",
        "s3://data/logs/*.jsonl": "logs",
        "hf://org/name:en:train": "name",
        "hf://org/name": "name",
        "some/*/x.txt": "x",
        "some/**/*.txt": "some",
        "*.txt": "data",
    }
    assert {address: name_for_runs(address) for address in names} == names


def test_a_run_trains_on_an_address_and_goes_on(bucket: Any, tmp_path: Path) -> None:
    put(
        bucket,
        **{"c/train.jsonl": FORMATS["jsonl"]([f"{n} some words" for n in range(40)]), "c/test.txt": b"a b c" * 20},
    )
    facts = detect(TextSource("s3://data/c"))
    assert (facts.task, facts.path, facts.files) == ("lm", "s3://data/c", 1)
    words = ("train", "--dataset-file", "s3://data/c", "--val-split", "test", "--bundle-dir", tmp_path / "b", *TEXT)
    ran = hrm(*words, "--steps", "2")
    assert ran.code == 0 and "s3://data/c (lm" in ran.out + ran.err, ran.err
    again = hrm("train", "--bundle-dir", tmp_path / "b", "--resume", "--steps", "4", "--launcher", "local")
    assert again.code == 0 and "step 4" in again.out + again.err, again.err
