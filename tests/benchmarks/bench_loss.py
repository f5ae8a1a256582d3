"""The loss over a large vocabulary, whole and in pieces: `python -m tests.benchmarks.bench_loss` prints bytes, times.

It runs forward and backward of the output head and its cross entropy for a growing number of tokens. Bytes are those of
the tensors that are alive at once, without the head's weight and its gradient.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrm_ray.model.scoring import SCORES_BYTES, score_tokens
from hrm_ray.train.storage_tracker import StorageTracker
from tests.benchmarks.timing import in_turn, machine, plain, summary, table

WHOLE = 2**62
"""A limit that no sequence reaches, so that its scores are computed whole."""


def problem(tokens: int, vocabulary: int, hidden_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [1, tokens, D] and a head [V, D], both with gradients, and labels."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, tokens, hidden_size, generator=draw).requires_grad_()
    head = (torch.randn(vocabulary, hidden_size, generator=draw) / hidden_size**0.5).requires_grad_()
    return hidden, head, torch.randint(0, vocabulary, (1, tokens), generator=draw)


def work(tokens: int, vocabulary: int, hidden_size: int, bytes_at_once: int) -> tuple[Callable[[], None], Tensor]:
    """One forward and backward pass, and the head it is about."""
    hidden, head, labels = problem(tokens, vocabulary, hidden_size)

    def once() -> None:
        hidden.grad = head.grad = None
        score_tokens(hidden, head, labels, "softmax", bytes_at_once).loss.sum().backward()

    return once, head


def peak_bytes(once: Callable[[], None], head: Tensor) -> int:
    """The most bytes alive besides the head and its gradient."""
    with StorageTracker() as watch:
        watch.name("head", [head])
        once()
        assert head.grad is not None
        watch.name("head", [head.grad])
    return watch.peak_bytes(beside=("head",))


def measure(tokens: int, vocabulary: int, hidden_size: int, rounds: int, whole_too: bool) -> dict[str, Any]:
    """One row: bytes and seconds in pieces and, where asked for, whole."""
    pieces, head = work(tokens, vocabulary, hidden_size, SCORES_BYTES)
    row: dict[str, Any] = {"tokens": tokens, "pieces_bytes": peak_bytes(pieces, head)}
    if not whole_too:
        return row | {"scores_bytes": 4 * tokens * vocabulary}
    whole, head = work(tokens, vocabulary, hidden_size, WHOLE)
    row["whole_bytes"] = peak_bytes(whole, head)
    pairs = [in_turn(number, (pieces, whole)) for number in range(rounds)]
    row["time_ratio"] = summary([one.wall_s / other.wall_s for one, other in pairs])
    return row | {"scores_bytes": 4 * tokens * vocabulary}


def main() -> None:
    """Read the options, measure, print and write."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="*", default=[256, 1024, 4096])
    parser.add_argument("--whole-up-to", type=int, default=1024, help="tokens up to which the whole is measured too")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the figures are written")
    said = parser.parse_args()
    torch.set_num_threads(said.threads)
    rows = [
        measure(tokens, said.vocabulary, said.hidden_size, said.rounds, tokens <= said.whole_up_to)
        for tokens in said.tokens
    ]
    lines = [
        (
            str(row["tokens"]),
            f"{row['scores_bytes'] / 1e6:.0f}",
            f"{row['whole_bytes'] / 1e6:.0f}" if "whole_bytes" in row else "",
            f"{row['pieces_bytes'] / 1e6:.0f}",
            row["time_ratio"].shown(2) if "time_ratio" in row else "",
        )
        for row in rows
    ]
    print(table(("tokens", "scores MB", "whole MB", "in pieces MB", "time, pieces / whole"), lines))
    if said.json is not None:
        figures = {"machine": machine(said.threads), "vocabulary": said.vocabulary, "rows": rows}
        said.json.write_text(json.dumps(plain(figures), indent=1))


if __name__ == "__main__":
    main()
