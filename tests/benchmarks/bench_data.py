"""What reading data costs, from files to packed batches.

`python -m tests.benchmarks.bench_data` prints tokens per second from a file to packed batches as a ratio to the
tokenizer's own `encode_batch` on the same threads, and the share of training that waits for data. `--memory` compares
the peak memory of a small and a large input, `--files` the speed of many small files and archive members with that of
one file of the same bytes. Everything is measured in one run, in turn.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hrm_ray.data.batches import LocalBatches
from hrm_ray.data.bpe import train_bpe
from hrm_ray.data.catalog import Catalog
from hrm_ray.data.chunk_source import ChunkPipeline, EpochOrder, LocalChunks
from hrm_ray.data.corpus import Corpus
from hrm_ray.data.packing import RowForm
from hrm_ray.data.parts import TextSource, list_parts
from hrm_ray.data.readers import read_documents
from hrm_ray.data.text_store import ChunkCache
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.train.loaders import BatchSize, StopCondition
from hrm_ray.train.stream_loader import StreamLoader, TextStream
from tests.benchmarks.timing import Summary, hrm_ray_command, in_turn, machine, plain, summary, table

SEQ_LEN = 512
ROWS = 16
VOCABULARY = 8192
PROBE = (
    "import resource, sys; from tests.benchmarks import bench_data as bench;"
    "bench.drain(bench.feed_of(sys.argv[1], bench.TextTokenizer.load(bench.Path(sys.argv[2]))));"
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
)
"""Reads a file through to its last batch in a process of its own; prints its peak resident memory in KB."""


def feed_of(path: str, tokenizer: TextTokenizer) -> StreamLoader:
    """The loader of one epoch of `path`, without a cache."""
    files = TextSource(path)
    corpus = Corpus(files, list_parts(files).parts, samples_per_block=100_000, chunk_size=4000)
    nowhere = Path(path).with_name("not-written")
    pipeline = ChunkPipeline(
        corpus, tokenizer, Catalog(nowhere, writes=False), ChunkCache(nowhere, 0, writes=False), pairs=False
    )
    source = LocalBatches(LocalChunks(pipeline, EpochOrder(0, shuffled=False)))
    text = TextStream(source, RowForm(SEQ_LEN), tokenizer.pad_id)
    return StreamLoader(text, BatchSize(ROWS, 1, 0, 1), seed=0, stop_condition=StopCondition(1))


def drain(loader: StreamLoader) -> int:
    """Take every batch of a loader; gives the number of rows."""
    rows = 0
    while taken := int(loader.next_batch([], 0)[0]["active"].sum()):
        rows += taken
    loader.close()
    return rows


def documents(corpus: Path) -> list[str]:
    """The texts of Python's documentation."""
    if not corpus.exists():
        hrm_ray_command(["data", "build", "text", "--out", corpus])
    return [document.text for document in read_documents(TextSource(str(corpus)))]


def write_lines(path: Path, texts: list[str], size_bytes: int) -> Path:
    """Repeat the texts in a .jsonl file of about that many bytes."""
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size_bytes:
            for line in lines:
                written += file.write(line)
                if written >= size_bytes:
                    break
    return path


def throughput(folder: Path, texts: list[str], rounds: int) -> dict[str, Any]:
    """Tokens per second from file to packed batches, against `encode_batch` of the same documents in thousands."""
    tokenizer = train_bpe(texts[:300], VOCABULARY, 300)
    file = write_lines(folder / "some.jsonl", texts, 12_000_000)
    loaded = [document.text for document in read_documents(TextSource(str(file)))]
    backend = tokenizer.backend
    tokens = 0

    def bare() -> None:
        nonlocal tokens
        batches = (loaded[at : at + 1024] for at in range(0, len(loaded), 1024))
        tokens = sum(len(one.ids) for b in batches for one in backend.encode_batch(b, add_special_tokens=False))

    pairs = [in_turn(n, [bare, lambda: drain(feed_of(str(file), tokenizer))]) for n in range(rounds + 1)][1:]
    ratio = summary([alone.wall_s / fed.wall_s for alone, fed in pairs])
    speed = tokens / summary([fed.wall_s for _, fed in pairs]).median
    print(f"file to packed batch: {speed / 1e6:.2f} million tokens/s, {ratio.shown()} of encode_batch's speed")
    return {"tokens_per_s": speed, "of_encode_batch": plain(ratio)}


def waiting(folder: Path, corpus: Path) -> dict[str, Any]:
    """The share of a run's time that the loop waits for its loader, at the demonstration's sizes."""
    from hrm_ray.launch import local
    from hrm_ray.launch.plan import make_plan
    from hrm_ray.launch.resolve import resolve
    from hrm_ray.metrics.fanout import FanOut
    from hrm_ray.settings.load import load_settings
    from hrm_ray.train.loop import TrainingLoop

    spent_s = {"offer": 0.0, "step": 0.0}
    next_batch, step = StreamLoader.next_batch, TrainingLoop.step

    def timed(name: str, work: Any) -> Any:
        def measured(*words: Any) -> Any:
            began = time.perf_counter()
            done = work(*words)
            spent_s[name] += time.perf_counter() - began
            return done

        return measured

    StreamLoader.next_batch, TrainingLoop.step = timed("offer", next_batch), timed("step", step)  # type: ignore[method-assign]
    options: dict[str, str | bool] = {
        **{"--dataset-file": str(corpus), "--bundle-dir": str(folder / "run"), "--launcher": "local", "--steps": "60"},
        **{"--hidden-size": "128", "--num-heads": "4", "--vocab-size": "2000", "--max-seq-len": "128"},
        **{"--no-use-moe": True, "--no-amp": True, "--dataset-chunk-size": "50", "--cache-gb": "0"},
    }
    local.run(make_plan(resolve(load_settings(options))), sink=FanOut([]), stop=lambda: None)
    StreamLoader.next_batch, TrainingLoop.step = next_batch, step  # type: ignore[method-assign]
    share = spent_s["offer"] / spent_s["step"]
    print(f"training waits for data {100 * share:.2f} % of the time of its steps (60 steps, nothing in the cache)")
    return {"wait_share": share}


def memory(folder: Path, texts: list[str], sizes_mb: list[int]) -> dict[str, Any]:
    """Peak resident memory of reading, tokenising and packing inputs of these sizes."""
    train_bpe(texts[:300], VOCABULARY, 300).save(folder / "tokenizer")
    rows, found = [], {}
    for size_mb in sizes_mb:
        file = write_lines(folder / "large.jsonl", texts, size_mb * 1_000_000)
        began = time.perf_counter()
        words = [sys.executable, "-c", PROBE, str(file), str(folder / "tokenizer")]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found[size_mb] = int(done.stdout) * 1024
        rows.append([f"{size_mb} MB", f"{found[size_mb] / 1e6:.0f}", f"{time.perf_counter() - began:.0f}"])
        file.unlink()
    print(table(("input", "peak MB", "seconds"), rows))
    print(f"the largest takes {found[sizes_mb[-1]] / found[sizes_mb[0]]:.2f} times the memory of the smallest")
    return {"peak_bytes": found}


def files(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Documents per second from many small files and archive members, and from one file of the same text."""
    text = "A small document, like one of very many others. " * 6

    def small() -> Iterator[tuple[str, bytes]]:
        for number in range(count):
            yield f"{number // 1000:04d}/{number:06d}.txt", f"{number} {text}".encode()

    one = folder / "one.jsonl"
    with one.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": content.decode()}) + "\n" for _, content in small())
    with zipfile.ZipFile(folder / "many.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in small():
            zipped.writestr(name, content)
    with tarfile.open(folder / "many.tar", "w") as tarred:
        for name, content in small():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tarred.addfile(entry, io.BytesIO(content))
    for name, content in small():
        path = folder / "many" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    tokenizer = train_bpe([text] * 50, 300, 50)
    names = ("one.jsonl", "many", "many.zip", "many.tar")
    works = [lambda name=name: drain(feed_of(str(folder / name), tokenizer)) for name in names]
    taken = [in_turn(number, works) for number in range(rounds)]
    found: dict[str, Summary] = {}
    for place, name in enumerate(names[1:], start=1):
        found[name] = summary([times[0].wall_s / times[place].wall_s for times in taken])
    print(f"{count} small documents, read to packed batches: speed against one .jsonl file of the same text")
    print(table(("", "ratio"), [[name, ratio.shown(2)] for name, ratio in found.items()]))
    return {name: plain(ratio) for name, ratio in found.items()}


def main() -> None:
    """Read the options, measure, print and write."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="interleaved pairs")
    parser.add_argument("--memory", type=int, nargs="+", metavar="MB", help="measure the memory of such inputs")
    parser.add_argument("--files", type=int, metavar="N", help="measure N small files and members")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    said = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(0)}
    with tempfile.TemporaryDirectory(prefix="hrm-ray-bench-") as name:
        folder = Path(name)
        texts = documents(folder / "corpus")
        if said.memory:
            found["memory"] = memory(folder, texts, said.memory)
        elif said.files:
            found["files"] = files(folder, said.files, said.rounds)
        else:
            found["throughput"] = throughput(folder, texts, said.rounds)
            found["waiting"] = waiting(folder, folder / "corpus")
    if said.json is not None:
        said.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
