"""Dropout draws by place: the same numbers for a row wherever, with whom and however often it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hrm_ray.model import dropout as dropping
from hrm_ray.model.config import model_config
from hrm_ray.model.dropout import Draws, dropout, key_of, mixed, row_keys
from hrm_ray.model.transforms import peft
from hrm_ray.model.transforms.activation_checkpointing import apply_activation_checkpointing
from hrm_ray.settings.load import load_settings
from hrm_ray.settings.resolve import resolve_task
from hrm_ray.train.assemble import assemble
from hrm_ray.train.loaders import BatchSize
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.world import World
from tests.support.chunked_cases import Shape, assert_same_forward, assert_same_gradients, in_chunks, trained, whole
from tests.support.splits import Rows
from tests.support.tiny_models import drawing, tiny_config, tiny_model

ROWS = 8
"""Rows of the effective batch."""


def splitmix(state: int) -> int:
    """SplitMix64's output as its authors wrote it, on unsigned numbers."""
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8))
def test_the_numbers_are_those_of_splitmix(states: list[int]) -> None:
    drawn = mixed(torch.tensor(states)).tolist()
    assert [number % 2**64 for number in drawn] == [splitmix(state % 2**64) for state in states]


def test_the_first_number_of_the_published_generator() -> None:
    assert int(mixed(torch.tensor([0x9E3779B97F4A7C15 - 2**64]))) % 2**64 == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("width", [64, 37])
def test_the_share_that_is_dropped_and_the_mean_that_stays(rate: float, width: int) -> None:
    drawn = dropout(torch.ones(64, 50, width), row_keys(3, 1, 0, torch.arange(64)), rate)
    deviation = (rate * (1 - rate) / drawn.numel()) ** 0.5
    assert float((drawn == 0).float().mean()) == pytest.approx(rate, abs=5 * deviation + 2**-16)
    assert float(drawn.mean()) == pytest.approx(1, abs=5 * deviation / (1 - rate) + 2**-8 * rate)


def test_what_is_kept_is_scaled_and_gets_the_gradient() -> None:
    x = torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    drawn = dropout(x, row_keys(0, 1, 0, torch.arange(4)), 0.25)
    drawn.sum().backward()
    assert x.grad is not None
    kept = drawn != 0
    torch.testing.assert_close(drawn[kept], (x / 0.75)[kept])
    torch.testing.assert_close(x.grad[kept], torch.full_like(x[kept], 1 / 0.75))
    assert not bool(x.grad[~kept].any())


def test_rows_steps_segments_sites_and_seeds_draw_apart() -> None:
    """Masks of places that differ in one thing agree at as many values as chance lets them: half of 4096."""
    ones, slots, masks = torch.ones(1, 64, 64), torch.tensor([5]), []
    for place in ((0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1), (1, 0, 0)):
        masks.append(dropout(ones, row_keys(*place, slots), 0.5))
    keys = row_keys(0, 1, 0, slots)
    masks.append(dropout(ones, row_keys(0, 1, 0, slots + 1), 0.5))
    draws = Draws(keys)
    for own in (draws, draws.looking_ahead()):
        for site, number in (((0, 0), 0), ((0, 0), 1), ((1, 0), 0), ((0, 1), 0)):
            masks.append(dropout(ones, own.keys(site, number, 64), 0.5))
    for number, mask in enumerate(masks):
        for other in masks[:number]:
            assert float((mask == other).float().mean()) == pytest.approx(0.5, abs=0.04)
        # Nor does a value follow from its neighbours, in its row or in the next.
        for shift, dim in ((1, 1), (1, 2), (4, 2)):
            assert float((mask == mask.roll(shift, dim)).float().mean()) == pytest.approx(0.5, abs=0.04)


def test_a_key_depends_on_the_place_of_each_number() -> None:
    places = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (2**63 - 1, 2**40), (2**40, 2**63 - 1)]
    assert len({key_of(*place) for place in places}) == len(places)


@given(
    cut=st.integers(1, 7),
    at=st.integers(1, 11),
    width=st.sampled_from([8, 6, 5]),
    seed=st.integers(0, 2**63 - 1),
    batch_idx=st.integers(0, 2**40),
)
def test_a_part_of_rows_and_positions_draws_what_the_whole_draws(
    cut: int, at: int, width: int, seed: int, batch_idx: int
) -> None:
    ones, slots = torch.ones(8, 12, width), torch.arange(8)

    def drawn(rows: slice, positions: slice) -> Tensor:
        draws = Draws(row_keys(seed, batch_idx, 1, slots[rows]), start=positions.start or 0)
        return dropout(ones[rows, positions], draws.keys((3, 1), 1, width), 0.4)

    every = slice(None)
    want = drawn(every, every)
    assert torch.equal(torch.cat([drawn(slice(cut), every), drawn(slice(cut, None), every)]), want)
    assert torch.equal(torch.cat([drawn(every, slice(at)), drawn(every, slice(at, None))], dim=1), want)


@contextmanager
def watched(patch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What every dropout inside the context draws: which values of each row it keeps [B, T, D]."""
    seen: list[Tensor] = []

    def watching(x: Tensor, keys: Tensor, rate: float) -> Tensor:
        seen.append(dropout(torch.ones_like(x), keys, rate) != 0)
        return dropout(x, keys, rate)

    with patch.context() as inside:
        inside.setattr(dropping, "dropout", watching)
        inside.setattr(peft, "dropout", watching)
        yield seen


def loop_of(task: str, rank: int, world_size: int, micro_batch: int, *words: tuple[str, Any]) -> TrainingLoop:
    accumulation = ROWS // world_size // micro_batch
    said = {"--hidden-size": "16", "--num-heads": "2", "--num-layers": "2", "--d-ff": "24", "--no-amp": True}
    said |= {"--dropout-rate": "0.5", "--batch-size": str(micro_batch), **dict(words)}
    said |= {"--gradient-accumulation-steps": str(accumulation)}
    settings = resolve_task(load_settings(said), task)
    config = model_config(settings, 17, seq_len=12)
    loop = assemble(settings, config, Rows(task), World(0, 1, torch.device("cpu"), grouped=False), 10)
    # A rank's rows without its group: what it draws follows from its slots.
    loop.parts.shape = loop.parts.loader.shape = BatchSize(micro_batch, accumulation, rank, world_size)
    return loop


def masks_of(patch: pytest.MonkeyPatch, *place: Any, recut: int | None = None) -> list[Tensor]:
    """What a rank's dropouts keep in one step, call by call, with its micro-batches one below the other."""
    loop = loop_of(*place)
    if recut is not None:
        loop.set_microbatch(recut)
    with watched(patch) as seen:
        loop.step()
    accumulation = loop.parts.shape.accumulation
    calls = len(seen) // accumulation
    return [torch.cat(seen[call::calls]) for call in range(calls)]


LORA = (("--use-peft", True), ("--lora-dropout", "0.3"), ("--no-gradient-checkpointing", True))


@pytest.mark.parametrize("words", [(("--no-gradient-checkpointing", True),), LORA], ids=["blocks", "adapters"])
@pytest.mark.parametrize("task", ["lm", "puzzle"])
def test_world_size_and_micro_batches_do_not_change_the_masks(
    task: str, words: tuple[tuple[str, Any], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    want = masks_of(monkeypatch, task, 0, 1, ROWS, *words)
    assert want and all(mask.shape[0] == ROWS for mask in want)
    cuts = [(1, 4, None), (1, 8, 2), (2, 4, None), (2, 4, 1), (4, 2, None), (8, 1, None)]
    for world_size, micro_batch, recut in cuts:
        ranks = [
            masks_of(monkeypatch, task, rank, world_size, micro_batch, *words, recut=recut)
            for rank in range(world_size)
        ]
        for own, parts in zip(want, zip(*ranks, strict=True), strict=True):
            assert torch.equal(torch.cat(parts), own)


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_adapters_that_drop_rows_of_their_weight_drop_the_same_on_every_rank(method: str) -> None:
    """They are dropped for the whole batch, so two ranks with the same rows have the same gradient."""
    words = (("--use-peft", True), ("--peft-method", method), ("--lora-dropout", "0.5"), ("--dropout-rate", "0"))
    found = []
    for rank in (0, 1):
        loop = loop_of("lm", rank, 2, 4, *words)
        loop.parts.loader.load_state_dict(0, {"taken": torch.tensor([4 * (1 - rank)]).numpy()})
        torch.rand(rank + 3)
        loop.step()
        found.append(loop.flush_metrics()["objective"])
    assert found[0] == found[1]
    loop = loop_of("lm", 0, 2, 4, *words, ("--seed", "1"))
    loop.step()
    assert loop.flush_metrics()["objective"] != found[0], "there is dropout"


@pytest.mark.parametrize("arch", ["actv1", "transformer"])
@pytest.mark.parametrize("recompute", [True, False])
def test_chunks_drop_what_whole_rows_drop(arch: str, recompute: bool) -> None:
    """States, losses and exact gradients of training in chunks are those of whole rows, with dropout too."""
    one_pass = {"arch": "transformer", "halt_max_steps": 1, "halt_rule": "none"} if arch == "transformer" else {}
    config = replace(tiny_config(**one_pass), dropout_rate=0.3)
    model = tiny_model(config)
    batch = drawing(Shape(((12,), (12,)), config).batch())
    want = trained(whole(model), batch)
    if recompute:
        apply_activation_checkpointing(model)
    got = trained(in_chunks(model, 5, exact=True), batch)
    assert_same_forward(got, want)
    assert_same_gradients(got, want)
    other = trained(whole(model), drawing(batch, seed=1))
    assert other.loss != want.loss, "there is dropout"


def test_a_batch_that_names_no_draws_is_a_bug() -> None:
    config = tiny_config(dropout_rate=0.3)
    with pytest.raises(ValueError, match="draws from the batch's keys"):
        trained(whole(tiny_model(config)), Shape(((12,),), config).batch())
