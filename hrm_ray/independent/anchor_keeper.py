"""Makes anchors and what is made of them: merges, held-out figures, checkpoints, the final bundle.

A process of its own, so that nobody waits for it. It decides nothing: every call is a function of files and of its
arguments, so it can be killed at any time, and another one started in its place.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hrm_ray.bundle.progress import STATE
from hrm_ray.bundle.weights_file import save_tensors
from hrm_ray.data.packing import TextSamples
from hrm_ray.data.prepare import PuzzlePlan, open_puzzle_sets
from hrm_ray.data.stream import TrainedRanges
from hrm_ray.data.text_data import TextDataDir
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.errors import DataError
from hrm_ray.independent.anchor_files import momentum_of, remove_anchor, seal_momentum, whole_momentum
from hrm_ray.independent.assembly import assemble_loop
from hrm_ray.independent.calls import AnchorRef
from hrm_ray.independent.coordinator import Merged, MergeRequest
from hrm_ray.independent.decisions import GUARD_SAMPLES, Member, leave_one_out, merge_weights, round_share, unfit
from hrm_ray.independent.weights import SharedWeights, anchor_tensors, check_file, save_fixed_tensors
from hrm_ray.ledger import Contribution
from hrm_ray.merging import OUTER_STEPS, AnchorFiles, MemberFigures, OuterStep, check_member, merge_deltas
from hrm_ray.merging import Member as MemberFile
from hrm_ray.merging.lora import LoraResidual
from hrm_ray.rundir import RunDir, file_sha256, read_json, verify_checkpoint
from hrm_ray.settings.cluster import ClusterSettings
from hrm_ray.train.checkpoint import Checkpointer, load_checkpoint, save_checkpoint
from hrm_ray.train.claimed_loader import ClaimedLoader
from hrm_ray.train.evaluate import EvalSet, evaluate
from hrm_ray.train.evaluator import Evaluator, Sampler
from hrm_ray.train.optimizer_state import load_optimizer
from hrm_ray.train.plan import RunPlan, TextData
from hrm_ray.train.precision import LossScaler
from hrm_ray.train.strategies.single import SingleStrategy
from hrm_ray.types import SampleSet, StopReason

_GUARD_ROWS = 32
"""Rows that the guard evaluates at a time, at least; where memory runs out, they are halved."""


@dataclass(frozen=True)
class Evaluated:
    """Held-out figures of an anchor, those of the best so far with their step, and whether these are the best."""

    figures: dict[str, float]
    best: dict[str, Any] | None
    improved: bool


@dataclass(frozen=True)
class LoaderPlace:
    """Where the loader of a strategy goes on after independent trainers: the arrays of its position, and what they have
    trained of the epoch from there on."""

    epoch: int
    position: Mapping[str, Sequence[int]]
    trained: TrainedRanges


@dataclass(frozen=True)
class Written:
    """An anchor's file: its path relative to the bundle, and its sha256."""

    path: str
    sha256: str


def outer_step(cluster: ClusterSettings) -> OuterStep:
    """The outer step of the settings."""
    chosen = OUTER_STEPS[cluster.outer_optimizer]
    if cluster.outer_optimizer == "none":
        return chosen
    lr = chosen.lr if cluster.outer_lr is None else cluster.outer_lr
    momentum = chosen.momentum if cluster.outer_momentum is None else cluster.outer_momentum
    return OuterStep(lr, momentum)


class AnchorKeeper:
    """Keeps a loop whose weights are those of an anchor, on this process's device."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self.settings = plan.settings
        self.run_dir = RunDir(plan.bundle)
        self.outer = outer_step(plan.settings.cluster)
        # Also where another keeper died while it wrote the first anchor.
        self.loop = assemble_loop(plan, starts=plan.checkpoint is None)
        self._weights = SharedWeights(self.loop)
        self._laid = ""
        samples = _held_out(plan)
        world = self.loop.world
        held_out = EvalSet.of_run(samples, self.settings, world)
        source = (str(self.settings.data.eval_file), self.settings.data.val_split)
        self.evaluator = Evaluator(self.loop, held_out, source, self.run_dir)
        self.checkpointer = Checkpointer(self.loop, self.run_dir, self.settings.run.keep)
        self._resumed_from: Path | None = None
        self._sampler: Sampler | None = None
        self._guard: EvalSet | None = None
        if samples is not None:
            rows = max(self.settings.optimizer.batch_size, _GUARD_ROWS)
            self._guard = EvalSet(samples, rows, -(-GUARD_SAMPLES // rows), GUARD_SAMPLES)
        self._losses: dict[str, float] = {}
        """Held-out losses of anchors by their sha256."""

    @property
    def methods(self) -> Mapping[str, Callable[..., Any]]:
        """The calls by their names."""
        own = (self.begin, self.resume, self.merge, self.evaluate, self.sample, self.save, self.hand_over, self.finish)
        return {method.__name__: method for method in own}

    def begin(self, checkpoint: Path | None) -> Written:
        """Write the first anchor of a run, from its first weights or from a checkpoint, and the tensors that are not
        trained."""
        if checkpoint is not None:
            load_checkpoint(self.loop, checkpoint)
        self.run_dir.independent.root.mkdir(exist_ok=True)
        save_fixed_tensors(self.loop, self.run_dir.independent.fixed)
        path = self.run_dir.independent.new_anchor(self.loop.progress.step)
        path.parent.mkdir(exist_ok=True)
        save_tensors(anchor_tensors(self.loop), path)
        return Written(self._relative(path), file_sha256(path))

    def resume(self, checkpoint: Path, best: dict[str, Any] | None = None) -> None:
        """Go on with the figures of a checkpoint, and with the `best` that a keeper found which died since."""
        extra = load_checkpoint(self.loop, checkpoint)
        self._resumed_from = checkpoint
        self._laid = ""
        self.evaluator.load_state_dict(extra)
        if best is not None:
            self.evaluator.best = best

    def merge(self, request: MergeRequest) -> Merged:
        """Merge a round: members whose files are whole, without those that the guard rejects."""
        began_s = time.monotonic()
        parent = self.run_dir.root / request.parent.path
        lost, rejected, members = self._whole_members(request, parent)
        merge = _RoundMerge(self, request, parent)
        if members:
            norms = {name: one.norm if one.finite else math.nan for name, one in merge.norms(members)}
            rejected |= unfit(norms, {one.name: one.sequences for one in members})
            members = [one for one in members if one.name not in rejected]
        figures: dict[str, float] = {}
        if members and self._guard is not None:
            by_name = {one.name: one for one in members}
            before = self._loss_before(request.parent)
            choice = leave_one_out(list(by_name), lambda names: merge.loss([by_name[n] for n in names]), before)
            rejected |= choice.rejected
            members = [by_name[name] for name in choice.taken]
            figures = {"anchor_loss": choice.loss} if members else {}
        names = tuple(one.name for one in members)
        seconds = time.monotonic() - began_s
        if not members:
            merge.discard_all_but(())
            return Merged((), rejected, lost, "", "", figures, seconds, warnings=merge.warnings)
        made = merge.result(members)
        merge.discard_all_but(names)
        if figures:
            self._losses = {made.sha256: figures["anchor_loss"]}
        share = _share(request, members)
        if share < 1:
            figures["share"] = share
        if made.lora is not None and made.lora.product > 0:
            figures["lora_residual"] = made.lora.residual / made.lora.product
        seconds = time.monotonic() - began_s
        path = self._relative(made.path)
        return Merged(names, rejected, lost, path, made.sha256, figures, seconds, made.copied, merge.warnings)

    def evaluate(self, anchor: AnchorRef) -> Evaluated | None:
        """Held-out figures of an anchor, whose weights go into best/ where they are the best; None without data."""
        self._lay(anchor)
        improved = self.evaluator.evaluate()
        if improved is None:
            return None
        self.checkpointer.saved_step = None
        return Evaluated(self.evaluator.figures, self.evaluator.best, improved)

    def sample(self, anchor: AnchorRef) -> str | None:
        """How the anchor continues --sample-prompt; None where it was asked before."""
        prompt = self.settings.run.sample_prompt
        if prompt is None or not isinstance(self.plan.data, TextData):
            return None
        self._lay(anchor)
        if self._sampler is None:
            self._sampler = Sampler(self.loop, TextTokenizer.of_bundle(self.run_dir.root), prompt)
        return self._sampler.sample()

    def save(self, anchor: AnchorRef, skipped: int) -> None:
        """Write the checkpoint of an anchor."""
        self._lay(anchor)
        self.loop.progress.skipped_samples = skipped
        state = {"round": anchor.round, "path": anchor.path, "sha256": anchor.sha256}
        self.checkpointer.save({**self.evaluator.state_dict(), "expert": None, "independent": state})

    def hand_over(self, anchor: AnchorRef, skipped: int, place: LoaderPlace, states: Sequence[Path]) -> Path | None:
        """Write the checkpoint of an anchor that a strategy goes on from at `place`; gives the folder whose optimizer
        state it has: the first of `states` (folders of checkpoints) that fits, else the checkpoint that this keeper
        resumed from; None where that has none either."""
        self._lay(anchor)
        loop = self.loop
        loop.progress.skipped_samples = skipped
        taken_from = next((folder for folder in states if self._take_optimizer(folder)), None)
        strategy = loop.parts.strategy
        if taken_from is None and isinstance(strategy, SingleStrategy) and strategy.optimizer.state:
            taken_from = self._resumed_from
        loader = loop.parts.loader
        if not isinstance(loader, ClaimedLoader):
            raise TypeError("a keeper of anchors has a ClaimedLoader")
        loader.epoch, loader.trained = place.epoch, place.trained
        loader.position = {name: np.array(values, dtype=np.int64) for name, values in place.position.items()}
        extra = {**self.evaluator.state_dict(), "expert": None, "trained": []}
        # Nothing is deleted: later checkpoints are set aside when the strategy begins.
        save_checkpoint(loop, self.run_dir, extra, keep=len(self.run_dir.checkpoint_steps()) + 1)
        return taken_from

    def _take_optimizer(self, folder: Path) -> bool:
        """Have the optimizer state and the loss scale of a trainer's checkpoint; False where they are of another
        optimizer or model, or damaged."""
        parts = self.loop.parts
        if not isinstance(parts.strategy, SingleStrategy):
            raise TypeError("a keeper of anchors has the strategy single")
        try:
            verify_checkpoint(folder)
            scale = read_json(folder / STATE)["loss_scaler"]
            load_optimizer(parts.strategy.optimizer, dict(parts.objective.named_parameters()), folder)
        except DataError:
            return False
        if parts.scaler is not None and scale is not None:
            parts.scaler = LossScaler(**scale)
        return True

    def finish(self, anchor: AnchorRef, reason: StopReason, epoch: int) -> None:
        """Write the final weights and metadata of a run that ended for `reason`."""
        self._lay(anchor)
        self.loop.parts.loader.epoch = epoch
        self.checkpointer.save_bundle(reason, self.evaluator.figures, self.evaluator.best)

    def close(self) -> None:
        """Release the data."""
        self.loop.parts.loader.close()

    def loss_of(self, path: Path, sha256: str) -> float:
        """The guard's held-out loss of a file with an anchor's tensors."""
        if self._guard is None:
            raise RuntimeError("there is no held-out data")
        self._weights.lay(path, sha256, keep_open_work=False)
        self._laid = sha256
        strategy, world = self.loop.parts.strategy, self.loop.world
        with strategy.evaluating() as objective, strategy.precision.computing(world.device):
            return evaluate(objective, self._guard, world)["loss"]

    def _loss_before(self, parent: AnchorRef) -> float:
        if parent.sha256 not in self._losses:
            self._losses = {parent.sha256: self.loss_of(self.run_dir.root / parent.path, parent.sha256)}
        return self._losses[parent.sha256]

    def _lay(self, anchor: AnchorRef) -> None:
        if self._laid != anchor.sha256:
            self._weights.lay(self.run_dir.root / anchor.path, anchor.sha256, keep_open_work=False)
            self._laid = anchor.sha256
        progress = self.loop.progress
        progress.step = progress.batch_idx = anchor.round
        progress.trained_samples = anchor.total_sequences
        self.loop.clock.position = anchor.round

    def _whole_members(
        self, request: MergeRequest, parent: Path
    ) -> tuple[dict[str, str], dict[str, str], list[Contribution]]:
        """Members whose file is missing or damaged, those of another model, and the others."""
        lost: dict[str, str] = {}
        rejected: dict[str, str] = {}
        whole: list[Contribution] = []
        for one in request.members:
            path = self.run_dir.root / one.path
            if not path.is_file():
                lost[one.name] = "its file is missing"
            elif file_sha256(path) != one.checksum:
                lost[one.name] = "its file is not what was written (sha256 differs)"
            else:
                try:
                    check_member(parent, MemberFile(path, 1.0))
                except DataError as error:
                    rejected[one.name] = error.faults[0].reason
                else:
                    whole.append(one)
        return lost, rejected, whole

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.run_dir.root).as_posix()


@dataclass(frozen=True)
class _Made:
    """A merge that was written, of all or some members of a round. `copied`: it is the weights of a sole trainer."""

    path: Path
    sha256: str
    figures: tuple[MemberFigures, ...]
    lora: LoraResidual | None
    copied: bool


class _RoundMerge:
    """The merges of one round: that of all members, and where the guard asks for them those without one, of which only
    the best is kept."""

    def __init__(self, keeper: AnchorKeeper, request: MergeRequest, parent: Path) -> None:
        self._keeper, self._request, self._parent = keeper, request, parent
        self._made: dict[tuple[str, ...], _Made] = {}
        self._everyone: tuple[str, ...] | None = None
        self._best: tuple[tuple[str, ...], float] | None = None
        momentum, needed = momentum_of(parent), bool(keeper.outer.momentum)
        self._momentum = momentum if needed and whole_momentum(parent) else None
        self.warnings = (
            (f"{momentum.name} is not what was written: the outer step begins again without momentum",)
            if needed and self._momentum is None and momentum.is_file()
            else ()
        )

    def norms(self, members: Sequence[Contribution]) -> list[tuple[str, MemberFigures]]:
        """The figures of each member's change."""
        return list(zip((one.name for one in members), self._merged(members).figures, strict=True))

    def loss(self, members: Sequence[Contribution]) -> float:
        """The held-out loss with these members; the first call is that with all."""
        made, names = self._merged(members), tuple(one.name for one in members)
        loss = self._keeper.loss_of(made.path, made.sha256)
        if self._everyone is None:
            self._everyone = names
        elif math.isfinite(loss) and (self._best is None or loss < self._best[1]):
            self._best = names, loss
        if self._everyone == names:
            return loss
        kept = (self._everyone, self._best[0] if self._best is not None else ())
        for tried in [tried for tried in self._made if tried not in kept]:
            self._discard(tried)
        return loss

    def result(self, members: Sequence[Contribution]) -> _Made:
        """The anchor with these members, read again: the ledger never names a file that is not whole."""
        made = self._merged(members)
        check_file(made.path, made.sha256)
        return made

    def discard_all_but(self, names: tuple[str, ...]) -> None:
        """Delete what was only tried."""
        for tried in [tried for tried in self._made if tried != names]:
            self._discard(tried)

    def _discard(self, names: tuple[str, ...]) -> None:
        remove_anchor(self._made.pop(names).path)

    def _merged(self, members: Sequence[Contribution]) -> _Made:
        names = tuple(one.name for one in members)
        if names not in self._made:
            self._made[names] = self._merge(members)
        return self._made[names]

    def _merge(self, members: Sequence[Contribution]) -> _Made:
        keeper, request = self._keeper, self._request
        root, outer = keeper.run_dir.root, keeper.outer
        weighed = [Member(one.name, one.worker, one.sequences, generation=one.generation) for one in members]
        weights = merge_weights(weighed, keeper.settings.cluster.merge_weights)
        share = _share(request, members)
        plain = outer.is_plain and share == 1.0 and len(members) == len(request.members)
        sole = self._sole_weights() if plain else None
        if sole is not None:
            files = [MemberFile(sole, 1.0, self._parent)]
        else:
            files = [
                MemberFile(root / one.path, weight, series=member.series)
                for one, member, weight in zip(members, weighed, weights, strict=True)
            ]
        path = keeper.run_dir.independent.new_anchor(request.round)
        report = merge_deltas(
            AnchorFiles(self._parent, self._momentum),
            files,
            outer,
            AnchorFiles(path, momentum_of(path) if outer.momentum else None),
            metadata={**_metadata(request, names=[one.name for one in members]), "share": str(share)},
            share=share,
        )
        if report.momentum_sha256 is not None:
            seal_momentum(path, report.momentum_sha256)
        figures = report.members if len(files) == len(members) else report.members * len(members)
        return _Made(path, report.sha256, figures, report.lora, copied=sole is not None)

    def _sole_weights(self) -> Path | None:
        """The file with the weights of a sole trainer after its last report, where it is whole."""
        whole = self._request.whole
        if whole is None or whole.weights_path is None:
            return None
        path = self._keeper.run_dir.root / whole.weights_path
        return path if path.is_file() and file_sha256(path) == whole.weights_sha256 else None


def _share(request: MergeRequest, members: Sequence[Contribution]) -> float:
    """The part of the trainers that is merged; what the guard leaves out is trained again, and merged then."""
    return round_share({one.worker for one in members}, request.samples_per_s)


def _metadata(request: MergeRequest, names: Sequence[str]) -> Mapping[str, str]:
    taken = sum(one.sequences for one in request.members if one.name in names)
    return {
        "round": str(request.round),
        "parent": str(request.parent.round),
        "parent_sha256": request.parent.sha256,
        "total_sequences": str(request.parent.total_sequences + taken),
        "members": json.dumps(list(names)),
    }


def _held_out(plan: RunPlan) -> SampleSet | None:
    if isinstance(plan.data, PuzzlePlan):
        return open_puzzle_sets(plan.data)[1]
    text = plan.data.text
    if text.evaluation is None:
        return None
    return TextSamples(TextDataDir(RunDir(plan.bundle).data).read_evaluation(text.evaluation), text.form)
