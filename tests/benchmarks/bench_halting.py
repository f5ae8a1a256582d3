"""How much one-segment foresight costs: the halting target `gain` against the best of all later segments.

`python -m tests.benchmarks.bench_halting BUNDLE` reads every held-out token out by four rules and prints loss and mean
segments: at the last segment; where the trained head halts; where the target it is trained on would halt (the next
segment does not lower the token's loss by more than the margin); and where the best of all later segments would not
either. The last two use the labels: they bound what a head can learn and are no way to generate.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from hrm_ray.bundle.store import open_bundle
from hrm_ray.data.packing import TextSamples
from hrm_ray.data.text_data import TextDataDir, TextPlan
from hrm_ray.errors import Fault, SettingsError
from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.layers import Context
from hrm_ray.model.losses import softmax_cross_entropy
from hrm_ray.model.scope import text_scope
from hrm_ray.train.microbatch import to_batch, wanted_columns
from hrm_ray.types import IGNORE_LABEL


def segment_losses(model: ActV1, samples: TextSamples, rows: int) -> tuple[Tensor, Tensor]:
    """Each valid token's loss after every segment [M, N] in nats, and its q_halt there [M, N]; nothing is frozen."""
    losses: list[Tensor] = []
    scores: list[Tensor] = []
    with torch.inference_mode():
        for first in range(0, min(rows, len(samples)), 16):
            indices = np.arange(first, min(first + 16, rows, len(samples)), dtype=np.int64)
            batch = to_batch(samples.rows(indices), wanted_columns(model.config), torch.device("cpu"))
            labels = batch["labels"]
            x = model.embedding(batch["inputs"], None, batch.get("positions"))
            scope = text_scope(batch.get("documents"), batch.get("prompt"), model.config.window_size)
            states = model.initial_states(len(labels), labels.shape[1])
            valid = labels != IGNORE_LABEL
            per_segment, q_halt = [], []
            for _ in range(model.config.halt_max_steps):
                states = model.segment(states, x, Context(scope, model.rotation(0, labels.shape[1])))
                per_segment.append(softmax_cross_entropy(model.logits(states.z_h), labels)[valid])
                q_halt.append(model.halting_scores(states.z_h)[0][valid])
            losses.append(torch.stack(per_segment))
            scores.append(torch.stack(q_halt))
    return torch.cat(losses, dim=1), torch.cat(scores, dim=1)


def read_at(losses: Tensor, stops: Tensor) -> dict[str, float]:
    """Mean loss and segments when each token is read at its first stop [M, N] (the last segment always stops)."""
    stops = stops.clone()
    stops[-1] = True
    first = stops.float().argmax(0)
    chosen = losses.gather(0, first.unsqueeze(0))
    return {"loss": float(chosen.mean()), "mean_segments": float(first.float().mean()) + 1}


def rules(losses: Tensor, scores: Tensor, margin: float) -> dict[str, dict[str, float]]:
    """Every rule's figures on the same tokens."""
    following = torch.cat((losses[1:], losses[-1:]))
    best_later = torch.flip(torch.cummin(torch.flip(following, (0,)), 0).values, (0,))
    return {
        "last segment": read_at(losses, torch.zeros_like(losses, dtype=torch.bool)),
        "trained head": read_at(losses, scores > 0),
        "target: next segment": read_at(losses, following >= losses - margin),
        "target: best of all later": read_at(losses, best_later >= losses - margin),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("bundle", type=Path, help="a language model trained with --halt-max-steps 3 or more")
    parser.add_argument("--rows", type=int, default=200, help="held-out rows to read")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    said = parser.parse_args()
    opened = open_bundle(said.bundle, torch.device("cpu"))
    config = opened.model.config
    if config.task != "lm" or config.halt_max_steps < 3:
        reason = "one segment ahead and all later ones are the same thing here"
        print(
            SettingsError(Fault(str(said.bundle), reason, "Give a language model of 3 or more segments")),
            file=sys.stderr,
        )
        raise SystemExit(2)
    data = opened.training_args["data"]
    text = TextPlan.from_plain(data)
    if text.evaluation is None:
        reason = "it was trained without held-out data"
        print(SettingsError(Fault(str(said.bundle), reason, "Train with --val-split or --eval-file")), file=sys.stderr)
        raise SystemExit(2)
    samples = TextSamples(TextDataDir(opened.run_dir.data).read_evaluation(text.evaluation), text.form)
    losses, scores = segment_losses(cast(ActV1, opened.model), samples, said.rows)
    margin = float(opened.training_args["settings"]["model"]["halt_margin"])
    figures = rules(losses, scores, margin)
    print(f"{losses.shape[1]} held-out tokens, {config.halt_max_steps} segments, margin {margin} nats")
    for name, row in figures.items():
        print(f"{name:<28} loss {row['loss']:.4f}   mean segments {row['mean_segments']:.2f}")
    if said.json is not None:
        said.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
