"""Evaluations of a run on held-out data, the weights of the best one, and samples of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hrm_ray.bundle.folder_watch import FolderWatch
from hrm_ray.bundle.store import BundleWeights, save_best, step_of_best
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.inference.text import Sampling, sample_text
from hrm_ray.rundir import RunDir
from hrm_ray.train.checkpoint import bundle_weights
from hrm_ray.train.evaluate import EvalSet, better, evaluate
from hrm_ray.train.loop import TrainingLoop

SAMPLE_TOKENS = 64
"""Tokens of a sample of text."""


class Sampler:
    """Continues a prompt greedily with one loop's weights, or their moving average."""

    def __init__(self, loop: TrainingLoop, tokenizer: TextTokenizer, prompt: str) -> None:
        self.loop = loop
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.sampled_step = -1

    def sample(self) -> str | None:
        """The continuation at the current step; None if that was given before. A collective."""
        step = self.loop.progress.step
        if self.sampled_step == step:
            return None
        self.sampled_step = step
        strategy, world = self.loop.parts.strategy, self.loop.world
        with strategy.evaluating() as objective, strategy.precision.computing(world.device):
            model, greedy = objective.model, Sampling(temperature=0.0)
            return world.from_leader(
                lambda: sample_text(model, self.tokenizer, self.prompt, sampling=greedy, max_new_tokens=SAMPLE_TOKENS)
            )


class Evaluator:
    """Evaluates one loop's weights, or their moving average; writes best/ into `run_dir`, where one is given.

    `source` identifies the held-out data: figures on other data cannot be compared.
    """

    def __init__(
        self,
        loop: TrainingLoop,
        held_out: EvalSet | None,
        source: Sequence[Any],
        run_dir: RunDir | None,
        watch: FolderWatch | None = None,
    ) -> None:
        self.loop = loop
        self.held_out = held_out
        self.run_dir = run_dir
        self.watch = watch
        self.best: dict[str, Any] | None = None
        self.figures: dict[str, float] = {}
        self.evaluated_step = -1
        self._source = [*source, held_out.count if held_out is not None else 0]
        # A resumed loop may have smaller micro-batches than the settings, after out of memory.
        self.limit_batch(loop.parts.shape.batch_size)

    def limit_batch(self, batch_size: int) -> None:
        """Evaluate in batches of at most `batch_size`, where that divides the present one."""
        held_out = self.held_out
        if held_out is not None and batch_size < held_out.batch_size and held_out.batch_size % batch_size == 0:
            self.held_out = held_out.with_batch(batch_size)

    def evaluate(self) -> bool | None:
        """Evaluate the current step, unless that was done; returns whether it is the best so far, None if nothing was
        done."""
        step = self.loop.progress.step
        if self.held_out is None or self.evaluated_step == step:
            return None
        strategy, world = self.loop.parts.strategy, self.loop.world
        with strategy.evaluating() as objective:
            with strategy.precision.computing(world.device):
                self.figures = evaluate(objective, self.held_out, world, self.loop.activity.progressed)
            improved = better(self.figures, self.best)
            if improved:
                self.best = best = {**self.figures, "step": step}
                weights, run_dir = bundle_weights(self.loop), self.run_dir
                if run_dir is not None:
                    world.from_leader(lambda: self._save_best(run_dir, weights, best))
        self.evaluated_step = step
        return improved

    def _save_best(self, run_dir: RunDir, weights: BundleWeights, best: dict[str, Any]) -> None:
        if self.watch is not None:
            self.watch.check()  # An evaluation can take long: another set of workers may have begun meanwhile.
        save_best(run_dir, weights, best)

    def state_dict(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {
            "best": self.best,
            "figures": self.figures,
            "evaluated_at": self.evaluated_step,
            "evaluated_on": self._source,
        }

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Restore a checkpoint's state; False, with nothing restored, where it was evaluated on other data.

        The best so far counts only while best/ holds its weights: not after resuming from before it, or into another
        bundle. Then the next evaluation is the best again.
        """
        if state["evaluated_on"] != self._source:
            return False
        best, run_dir = state["best"], self.run_dir
        if best is not None and run_dir is not None:
            stored = self.loop.world.from_leader(lambda: step_of_best(run_dir))
            best = best if stored == best["step"] else None
        self.best = best
        self.figures = state["figures"]
        self.evaluated_step = state["evaluated_at"]
        return True
