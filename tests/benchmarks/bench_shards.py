"""What a rank of a text run receives, and what that costs: its rows of each batch, against whole chunks.

`python -m tests.benchmarks.bench_shards` steps the loaders of 2, 8 and 64 ranks through the same tokenised text,
without a model. `whole chunks` is the design before: every rank received every chunk and cut its rows out of it. Calls
carry pickled values, as between processes. Times are processor times, so that ranks which share this machine's cores
are measured as if each had its own; rows per second follow from the slower of server and rank. Both designs are
measured in turn in one run.
"""

from __future__ import annotations

import argparse
import json
import pickle
import tempfile
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path

from hrm_ray.data.batch_server import BatchServer, ServedBatches
from hrm_ray.data.batches import BatchSource, LocalBatches
from hrm_ray.data.bpe import train_bpe
from hrm_ray.data.catalog import Catalog
from hrm_ray.data.chunk_source import Chunk, ChunkPipeline, EpochOrder, InMemoryChunks
from hrm_ray.data.corpus import Corpus
from hrm_ray.data.packing import RowForm
from hrm_ray.data.parts import TextSource, list_parts
from hrm_ray.data.text_store import ChunkCache
from hrm_ray.train.loaders import BatchSize, StopCondition
from hrm_ray.train.stream_loader import StreamLoader, TextStream
from tests.benchmarks.bench_data import VOCABULARY, documents, write_lines
from tests.benchmarks.timing import machine, summary, table
from tests.support.pickled_calls import PickledCalls

RANKS = (2, 8, 64)
CHUNK_ROWS = 200


class SentChunks:
    """A rank's ChunkSource: every chunk, pickled."""

    def __init__(self, chunks: InMemoryChunks) -> None:
        self._chunks = chunks
        self.received_bytes = 0

    def chunks(self, epoch: int, position: int) -> Generator[Chunk, None, None]:
        """See ChunkSource."""
        for chunk in self._chunks.chunks(epoch, position):
            sent = pickle.dumps(chunk, protocol=5)
            self.received_bytes += len(sent)
            yield pickle.loads(sent)


@dataclass(frozen=True)
class Cost:
    """Per step: bytes that a rank receives, processor milliseconds of a rank and of the server, and rows per second."""

    rank_bytes: float
    rank_ms: float
    server_ms: float
    rows_per_s: float


def stepped(loaders: list[StreamLoader]) -> tuple[int, float, float]:
    """Steps of an epoch, and the processor seconds that ranks and everything else in this process took."""
    steps, ranks_s, began_s = 0, 0.0, time.process_time()
    rows = 1
    while rows:
        rows = 0
        for loader in loaders:
            rank_s = time.thread_time()
            rows += int(loader.next_batch([], 0)[0]["active"].sum())
            ranks_s += time.thread_time() - rank_s
        steps += 1
    others_s = time.process_time() - began_s - ranks_s
    for loader in loaders:
        loader.close()
    return steps, ranks_s, others_s


def measured(chunks: InMemoryChunks, ranks: int, rows: int, form: RowForm, shuffle_rows: int, *, whole: bool) -> Cost:
    """One epoch of `rows` rows for each rank and step."""
    sent = [SentChunks(chunks) for _ in range(ranks)]
    calls = PickledCalls(BatchServer(chunks, ranks), ranks)
    loaders = []
    for rank in range(ranks):
        source: BatchSource = LocalBatches(sent[rank]) if whole else ServedBatches(calls, rank)
        text = TextStream(source, form, 0, shuffle_rows)
        loaders.append(StreamLoader(text, BatchSize(rows, 1, rank, ranks), seed=0, stop_condition=StopCondition(1)))
    steps, ranks_s, others_s = stepped(loaders)
    calls.shut_down()
    received = max(one.received_bytes for one in sent) if whole else max(calls.received_bytes.values())
    rank_s, server_s = ranks_s / ranks / steps, 0.0 if whole else others_s / steps
    return Cost(received / steps, 1e3 * rank_s, 1e3 * server_s, ranks * rows / max(rank_s, server_s))


def tokenised(folder: Path, megabytes: int) -> InMemoryChunks:
    """Chunks of Python's documentation, repeated to that size."""
    texts = documents(folder / "corpus")
    source = TextSource(str(write_lines(folder / "text.jsonl", texts, megabytes * 1_000_000)))
    pipeline = ChunkPipeline(
        Corpus(source, list_parts(source).parts, samples_per_block=100_000, chunk_size=CHUNK_ROWS),
        train_bpe(texts[:300], VOCABULARY, 300),
        Catalog(folder / "not-written", writes=False),
        ChunkCache(folder / "not-written", 0, writes=False),
        pairs=False,
    )
    return InMemoryChunks(pipeline, EpochOrder(0, shuffled=False))


def main() -> None:
    """Read the options, measure, print and write."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="interleaved pairs; their median is shown")
    parser.add_argument("--megabytes", type=int, default=20, help="of text")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    said = parser.parse_args()
    lines, found = [], {}
    with tempfile.TemporaryDirectory(prefix="hrm-ray-bench-") as name:
        chunks = tokenised(Path(name), said.megabytes)
        for rows, seq_len, shuffle_rows in ((8, 512, 0), (8, 512, 10_000), (2, 64, 0)):
            for ranks in RANKS:
                pairs = [
                    [
                        measured(chunks, ranks, rows, RowForm(seq_len), shuffle_rows, whole=whole)
                        for whole in (True, False)
                    ]
                    for _ in range(said.rounds)
                ]
                medians = [
                    {
                        field: summary([asdict(pair[way])[field] for pair in pairs]).median
                        for field in asdict(pairs[0][0])
                    }
                    for way in (0, 1)
                ]
                words = f"{rows} x {seq_len}" + (", shuffled" if shuffle_rows else "")
                before, after = medians
                lines.append(
                    [words, str(ranks)]
                    + [f"{before[name]:.4g} / {after[name]:.4g}" for name in before]
                    + [
                        f"{after['rank_bytes'] / before['rank_bytes']:.3f}",
                        f"{after['rows_per_s'] / before['rows_per_s']:.2f}",
                    ]
                )
                found[f"{words}, {ranks} ranks"] = medians
    print("whole chunks / own rows, per step")
    heads = ("rows of a rank", "ranks", "bytes of a rank", "ms of a rank", "ms of the server", "rows/s")
    print(table((*heads, "bytes ratio", "rows/s ratio"), lines))
    if said.json is not None:
        said.json.write_text(json.dumps({"machine": machine(0), "shards": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
