"""The data of a run as the ledger's blocks and chunks, and the order in which independent trainers claim them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hrm_ray.data.catalog import Catalog
from hrm_ray.data.chunk_source import EpochOrder
from hrm_ray.data.order import ChunkOrder
from hrm_ray.data.prepare import PuzzlePlan, open_puzzle_sets
from hrm_ray.data.text_data import TextDataDir
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.ledger import BlockLength
from hrm_ray.rundir import RunDir
from hrm_ray.train.claimed_rows import puzzle_chunks
from hrm_ray.train.plan import RunPlan

_CHUNKS_BETWEEN_CALLS = 16


@dataclass
class DataOrder:
    """A `ClaimOrder`: the chunks of an epoch in the order of the text (or in turn, for puzzles). The first epoch leaves
    out those before chunk `start`. `shuffled`: whether ranges count places of a shuffled window."""

    epochs: EpochOrder
    block_sizes: Sequence[int]
    shuffled: bool = False
    _numbers: dict[int, ChunkOrder | list[int]] = field(default_factory=dict)

    @property
    def start(self) -> int:
        return self.epochs.start

    def __call__(self, epoch: int, position: int) -> int:
        """The chunk at a position of an epoch."""
        first = self.start if epoch == 0 else 0
        if not self.epochs.shuffled:
            return position + first
        order = self._numbers.get(epoch)
        if order is None:
            shuffled = ChunkOrder(self.epochs.seed, epoch, self.block_sizes)
            # Only the first epoch can leave chunks out; a list of numbers is needed there alone.
            order = (
                [n for place in range(len(shuffled)) if (n := shuffled.at(place)[0]) >= first] if first else shuffled
            )
            self._numbers = {epoch: order}
        return order[position] if isinstance(order, list) else order.at(position)[0]


def prepare_claims(plan: RunPlan, on_read: Callable[[str], None]) -> tuple[DataOrder, list[BlockLength]]:
    """The order of claims and all blocks. Text that the catalog does not know yet is read to its end.

    `on_read` is called while it is read, with a message or without (empty); what it raises ends the reading.
    """
    if isinstance(plan.data, PuzzlePlan):
        chunks = puzzle_chunks(len(open_puzzle_sets(plan.data)[0]))
        return DataOrder(EpochOrder(plan.settings.run.seed, shuffled=False), [chunks]), [BlockLength(0, chunks)]
    text = plan.data.text
    catalog = whole_catalog(plan, on_read)
    sizes = catalog.block_sizes()
    blocks = [BlockLength(block, size) for block, size in enumerate(sizes)]
    return DataOrder(text.epoch_order, sizes, text.shuffle_rows > 0), blocks


def whole_catalog(plan: RunPlan, on_read: Callable[[str], None]) -> Catalog:
    """The catalog of a run on text, read to its end where that is not known yet, and closed."""
    if isinstance(plan.data, PuzzlePlan):
        raise TypeError("puzzles have no catalog")
    text, run_dir = plan.data.text, RunDir(plan.bundle)
    pipeline = TextDataDir(run_dir.data).pipeline(
        text.chunking_config, text.source, TextTokenizer.of_bundle(run_dir.root), pairs=text.form.prefix, writes=True
    )
    catalog = pipeline.catalog
    if not catalog.ended:
        on_read("reading the whole data once: trainers claim any part of it")
    while not catalog.ended:
        pipeline.scan(len(catalog) + _CHUNKS_BETWEEN_CALLS)
        on_read("")
    catalog.close()
    return catalog
