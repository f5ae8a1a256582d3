"""Block trainers in one process: a real ledger, the real coordinator, and a naive merge, turn by turn.

What is held against them is in tests/unit/test_block_trainer.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hrm_ray.bundle.weights_file import read_tensors, save_tensors
from hrm_ray.independent.assembly import assemble_loop, samples_per_step
from hrm_ray.independent.calls import AnchorRef
from hrm_ray.independent.claims import prepare_claims
from hrm_ray.independent.coordinator import LedgerCoordinator, Merged, MergeRequest, Rules
from hrm_ray.independent.decisions import Member, merge_weights
from hrm_ray.independent.trainer import BlockTrainer
from hrm_ray.independent.weights import anchor_tensors, save_fixed_tensors
from hrm_ray.launch.plan import make_plan
from hrm_ray.launch.resolve import resolve
from hrm_ray.launch.run_directory import load_run
from hrm_ray.ledger import Contribution, open_ledger
from hrm_ray.rundir import RunDir, file_sha256
from hrm_ray.train.claimed_loader import ClaimedLoader
from hrm_ray.train.loaders import HaltedSlots
from hrm_ray.train.plan import RunPlan, effective_batch
from hrm_ray.types import Columns
from tests.support.runs import last_said

RowKey = bytes


class Clock:
    """A clock that tests set; sleeping moves it on."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def plan_of(data: Path, bundle: Path, *words: object) -> RunPlan:
    """The plan of `hrm-ray train` on the words, with its bundle prepared."""
    said: dict[str, str | bool] = {}
    given = [str(word) for word in last_said(["--dataset-file", data, "--bundle-dir", bundle, *words])]
    for place, word in enumerate(given):
        if word.startswith("--"):
            has_value = place + 1 < len(given) and not given[place + 1].startswith("--")
            said[word] = given[place + 1] if has_value else True
    return make_plan(resolve(load_run(said)))


@dataclass
class Block:
    """A run of block trainers in this process."""

    plan: RunPlan
    report_updates: int
    whole_weights: bool = False
    clock: Clock = field(default_factory=Clock)
    trained: dict[str, list[tuple[bytes, ...]]] = field(default_factory=dict)
    """The rows of every batch, by trainer."""

    def __post_init__(self) -> None:
        self.run_dir = RunDir(self.plan.bundle)
        self.ledger = open_ledger(self.run_dir.ledger, durable=False)
        order, blocks = prepare_claims(self.plan, lambda message: None)
        self.ledger.add_blocks(blocks)
        self.ledger.end_data()
        rules = Rules(
            samples_per_update=effective_batch(self.plan),
            samples_per_step=samples_per_step(self.plan),
            merge_every=self.report_updates,
            epochs=self.plan.settings.run.epochs,
            whole_weights=self.whole_weights,
        )
        self.coordinator = LedgerCoordinator(self.ledger, self._first_anchor(), rules, order, self.clock)
        self.anchors: list[AnchorRef] = [self.coordinator.anchor]

    def _first_anchor(self) -> AnchorRef:
        folder = self.run_dir.independent
        folder.anchors.mkdir(parents=True)
        loop = assemble_loop(self.plan, starts=True)
        save_fixed_tensors(loop, folder.fixed)
        path = folder.anchors / "round-000000.safetensors"
        save_tensors(anchor_tensors(loop), path)
        loop.parts.loader.close()
        return AnchorRef(0, path.relative_to(self.run_dir.root).as_posix(), file_sha256(path), 0)

    @contextmanager
    def trainer(self, name: str = "0", number: int = 0) -> Iterator[BlockTrainer]:
        loop = assemble_loop(self.plan, number)
        loader = loop.parts.loader
        assert isinstance(loader, ClaimedLoader)
        rows, real = self.trained.setdefault(name, []), loader.next_batch

        def next_batch(halted: HaltedSlots, step: int) -> list[Columns]:
            micro_batches = real(halted, step)
            active = [micro["inputs"][micro["active"]] for micro in micro_batches]
            rows.append(tuple(row.tobytes() for part in active for row in part))
            return micro_batches

        loader.next_batch = next_batch  # type: ignore[method-assign]
        trainer = BlockTrainer(
            name,
            loop,
            self.run_dir,
            self.coordinator,
            samples_per_update=samples_per_step(self.plan),
            clock=self.clock,
            sleep=self.clock.sleep,
        )
        try:
            yield trainer
        finally:
            loader.close()

    def merge(self) -> None:
        """Merge the round that is due, if one is."""
        request = self.coordinator.due()
        if request is None:
            return
        anchor = read_tensors(self.run_dir.root / request.parent.path)
        copied = self._copied(request)
        merged = copied or self._summed(request, anchor)
        path = self.run_dir.independent.anchors / f"round-{request.round:06d}.safetensors"
        save_tensors(merged, path)
        names = tuple(member.name for member in request.members)
        place = path.relative_to(self.run_dir.root).as_posix()
        made = Merged(names, {}, {}, place, file_sha256(path), {}, 0.0, copied=copied is not None)
        self.coordinator.commit(request, made)
        self.anchors.append(self.coordinator.anchor)

    def _copied(self, request: MergeRequest) -> dict[str, Tensor] | None:
        whole = request.whole
        if whole is None or whole.weights_path is None:
            return None
        assert file_sha256(self.run_dir.root / whole.weights_path) == whole.weights_sha256
        return read_tensors(self.run_dir.root / whole.weights_path)

    def _summed(self, request: MergeRequest, anchor: dict[str, Tensor]) -> dict[str, Tensor]:
        members = [Member(one.name, one.worker, one.sequences, generation=one.generation) for one in request.members]
        for member, weight in zip(request.members, merge_weights(members, "samples"), strict=True):
            change = self.change(member)
            for name in anchor:
                anchor[name] += weight * change[name]
        return anchor

    def change(self, member: Contribution) -> dict[str, Tensor]:
        assert file_sha256(self.run_dir.root / member.path) == member.checksum
        return read_tensors(self.run_dir.root / member.path)

    def weights(self) -> dict[str, Tensor]:
        """The newest anchor."""
        return read_tensors(self.run_dir.root / self.coordinator.anchor.path)

    def rows(self) -> Counter[bytes]:
        """How often each row was in a batch, of any trainer."""
        return Counter(row for batches in self.trained.values() for batch in batches for row in batch)


def shared_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a model's weights those that are trained."""
    return {name: tensor for name, tensor in weights.items() if name.rpartition(".")[2] not in ("H_init", "L_init")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are the same to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
