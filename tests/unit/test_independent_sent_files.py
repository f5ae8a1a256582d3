"""Files of a bundle on another machine: fetched and delivered in pieces, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.errors import DataError
from hrm_ray.independent import bundle_files
from hrm_ray.independent.bundle_files import FileServer, SentFiles, SharedFiles
from hrm_ray.metrics.jsonl import read_records, to_line
from hrm_ray.rundir import RunDir
from hrm_ray.types import Record

ANCHOR = "independent/anchors/round-1.a.safetensors"


def connected(folder: Path) -> tuple[RunDir, SentFiles, list[int]]:
    """A bundle, a trainer's files on another machine, and the sizes of all that was sent between them."""
    bundle, sizes = RunDir(folder / "bundle"), list[int]()
    methods = FileServer(bundle).methods

    def call(name: str, *arguments: Any) -> Any:
        given: Callable[..., Any] = methods[name]
        answer = given(*arguments)
        sizes.extend(len(each) for each in (answer, *arguments) if isinstance(each, bytes))
        return answer

    return bundle, SentFiles(folder / "trainer", call), sizes


@given(content=st.binary(max_size=50), piece=st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_files_arrive_whole_in_pieces(tmp_path_factory: pytest.TempPathFactory, content: bytes, piece: int) -> None:
    before, bundle_files.PIECE_BYTES = bundle_files.PIECE_BYTES, piece
    try:
        bundle, files, sizes = connected(tmp_path_factory.mktemp("sent"))
        bundle.independent.anchors.mkdir(parents=True)
        (bundle.root / ANCHOR).write_bytes(content)
        assert files.fetch(ANCHOR).read_bytes() == content
        own = files.run_dir.independent.new_contribution("trainer-0-1-1")
        own.parent.mkdir(parents=True)
        own.write_bytes(content)
        name = own.relative_to(files.run_dir.root).as_posix()
        files.deliver(name)
        assert (bundle.root / name).read_bytes() == content
        assert not own.exists()
        assert max(sizes, default=0) <= piece
    finally:
        bundle_files.PIECE_BYTES = before


def test_of_anchors_only_the_newest_stays_and_a_missing_one_is_missing(tmp_path: Path) -> None:
    bundle, files, _ = connected(tmp_path)
    bundle.independent.anchors.mkdir(parents=True)
    for number in (1, 2):
        (bundle.independent.anchors / f"round-{number}.a.safetensors").write_bytes(b"x")
        files.fetch(f"independent/anchors/round-{number}.a.safetensors")
    assert [path.name for path in files.run_dir.independent.anchors.iterdir()] == ["round-2.a.safetensors"]
    assert not files.fetch("independent/anchors/round-9.a.safetensors").exists()


def test_a_trainer_finds_its_state_on_another_machine(tmp_path: Path) -> None:
    bundle, files, sizes = connected(tmp_path)
    files.fetch_state("trainer-0")
    own = RunDir(files.run_dir.independent.trainer("trainer-0"))
    for step in (3, 7):
        partial = own.partial_checkpoint(step)
        partial.mkdir(parents=True)
        (partial / "moments").write_bytes(b"m" * step)
        own.describe_checkpoint(step, partial)
        own.seal_checkpoint(step, partial)
        with own.metrics.open("ab") as file:
            file.write(to_line(Record("train", step, 1.0, {"loss": 2.0})))
        files.deliver_state("trainer-0")
    with own.metrics.open("ab") as file:
        file.write(to_line(Record("train", 8, 1.0, {"loss": 2.0})))
    files.deliver_state("trainer-0")
    there = RunDir(bundle.independent.trainer("trainer-0"))
    assert there.checkpoint_steps() == [7] and there.newest_whole_checkpoint() == there.checkpoint(7)
    assert [record.step for record in read_records(there.metrics)] == [3, 7, 8]
    assert sizes.count(7) >= 2, "only new records are sent"
    again = SentFiles(tmp_path / "another", files._call)
    again.fetch_state("trainer-0")
    begun = RunDir(again.run_dir.independent.trainer("trainer-0"))
    assert begun.newest_whole_checkpoint() == begun.checkpoint(7)
    assert [record.step for record in read_records(begun.metrics)] == [3, 7], "step 8 is taken again"
    with begun.metrics.open("ab") as file:
        file.write(to_line(Record("train", 9, 1.0, {})))
    again.deliver_state("trainer-0")
    assert [record.step for record in read_records(there.metrics)] == [3, 7, 9]


def test_records_of_a_trainer_are_cut_back_to_its_state(tmp_path: Path) -> None:
    bundle = RunDir(tmp_path)
    own = RunDir(bundle.independent.trainer("trainer-0"))
    own.root.mkdir(parents=True)
    own.metrics.write_bytes(b"".join(to_line(Record("train", step, 1.0, {})) for step in (1, 2)))
    SharedFiles(bundle).fetch_state("trainer-0")
    assert list(read_records(own.metrics)) == []
    own.metrics.write_bytes(b"no record\n")
    SharedFiles(bundle).fetch_state("trainer-0")
    assert own.metrics.read_bytes() == b"no record\n"


@pytest.mark.parametrize("path", ["config.json", "independent/../config.json", "/etc/nothing"])
def test_no_other_file_is_given_or_written(tmp_path: Path, path: str) -> None:
    bundle, files, _ = connected(tmp_path)
    bundle.root.mkdir()
    bundle.config.write_text("{}")
    with pytest.raises(DataError, match="no file of the trainers"):
        files.fetch(path)
    with pytest.raises(DataError, match="no file of the trainers"):
        files.remove(path)
    assert bundle.config.read_text() == "{}"


def test_a_file_that_is_gone_in_the_middle_is_not_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, files, _ = connected(tmp_path)
    bundle.independent.anchors.mkdir(parents=True)
    (bundle.root / ANCHOR).write_bytes(b"0123456789")
    monkeypatch.setattr(bundle_files, "PIECE_BYTES", 4)
    genuine = files._call

    def cut(name: str, *arguments: Any) -> Any:
        return b"" if name == "read_piece" and arguments[1] else genuine(name, *arguments)

    files._call = cut
    assert not files.fetch(ANCHOR).exists()
    files._call = genuine
    assert files.fetch(ANCHOR).read_bytes() == b"0123456789"
