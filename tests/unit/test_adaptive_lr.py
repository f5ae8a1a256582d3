"""The learning rate follows the loss trend: scripted curves for the rule, windows, and whole runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hrm_ray.errors import SettingsError
from hrm_ray.settings.adaptive_lr import AdaptiveLrSettings, read_adaptive_lr
from hrm_ray.train.adaptive_lr import Action, AdaptiveLr, Trend, judge

RULE = AdaptiveLrSettings()
rules = st.builds(
    AdaptiveLrSettings,
    min_improvement=st.floats(0, 0.5),
    plateau_windows=st.integers(1, 4),
    plateau_factor=st.floats(0.3, 0.9),
    divergence_rise=st.floats(0.01, 1),
    divergence_factor=st.floats(0.05, 0.3),
    cooldown_windows=st.integers(0, 3),
    min_factor=st.floats(0.001, 1),
)
any_loss = st.floats(0, 20) | st.sampled_from([math.inf, math.nan, 1e30])


def judged(rule: AdaptiveLrSettings, losses: list[float], trend: Trend | None = None) -> tuple[Trend, list[Action]]:
    trend, actions = trend or Trend(), []
    for loss in losses:
        trend, action = judge(rule, trend, loss)
        actions.append(action)
    return trend, actions


def kinds(actions: list[Action]) -> list[str]:
    return [action.kind for action in actions]


@given(rules, st.lists(any_loss, max_size=40))
def test_the_factor_only_falls_and_never_below_the_minimum(rule: AdaptiveLrSettings, losses: list[float]) -> None:
    trend = Trend()
    for loss in losses:
        after, action = judge(rule, trend, loss)
        assert min(rule.min_factor, 1.0) <= after.factor <= trend.factor
        assert (after.factor < trend.factor) == (action.kind != "hold")
        assert action.reason
        trend = after


@given(rules, st.floats(0.1, 20), st.floats(0.6, 0.99), st.integers(1, 30))
def test_a_loss_that_falls_fast_enough_is_stable(
    rule: AdaptiveLrSettings, start: float, share: float, windows: int
) -> None:
    """Each window better than the last by a little more than is asked for: nothing is changed, however long."""
    shrink = (1 - rule.min_improvement) * share
    trend, actions = judged(rule, [start * shrink**window for window in range(windows)])
    assert set(kinds(actions)) == {"hold"} and trend.factor == 1.0


@given(rules, st.floats(0.1, 20), st.integers(1, 60))
def test_a_constant_loss_is_a_plateau_again_and_again(rule: AdaptiveLrSettings, loss: float, windows: int) -> None:
    """Cuts come after one window to compare with and `plateau_windows` more, with a cool-down between them."""
    trend, actions = judged(rule, [loss] * windows)
    length = 1 + rule.plateau_windows
    factor, want = 1.0, ["hold"] * windows
    for at in range(length - 1, windows, length + rule.cooldown_windows):
        lowered = max(factor * rule.plateau_factor, rule.min_factor)
        want[at] = "lower" if lowered < factor else "hold"
        factor = min(lowered, factor)
    assert kinds(actions) == want
    assert trend.factor == factor


@given(rules, st.floats(0.1, 5), st.floats(1.001, 10) | st.sampled_from([math.inf, math.nan]), st.integers(0, 3))
def test_a_jump_steps_back_once_and_then_cools_down(
    rule: AdaptiveLrSettings, loss: float, jump: float, better: int
) -> None:
    """A jump past the rise is answered in its own window, with the larger cut, and not again while it settles."""
    falling = [loss * 0.4**window for window in range(better + 1)]
    high = falling[-1] * (1 + rule.divergence_rise) * jump
    trend, actions = judged(rule, [*falling, high, *[high] * rule.cooldown_windows])
    back = max(rule.divergence_factor, rule.min_factor)
    want = "step_back" if back < 1 else "hold"
    assert kinds(actions) == ["hold"] * len(falling) + [want] + ["hold"] * rule.cooldown_windows
    assert trend == Trend(factor=min(back, 1.0))


def test_a_rise_within_bounds_is_no_divergence() -> None:
    """20 % above the best is the bound; just below it the loss is only no better."""
    assert kinds(judged(RULE, [2.0, 2.39])[1]) == ["hold", "hold"]
    assert kinds(judged(RULE, [2.0, 2.41])[1]) == ["hold", "step_back"]


def test_slow_progress_adds_up() -> None:
    """0.4 % a window: every third one is 1 % below the best, so there is never a plateau of four."""
    rule = AdaptiveLrSettings(plateau_windows=4)
    assert set(kinds(judged(rule, [2.0 * 0.996**window for window in range(40)])[1])) == {"hold"}
    assert "lower" in kinds(judged(rule, [2.0 * 0.998**window for window in range(40)])[1])


@given(rules, st.lists(st.floats(0, 20), min_size=1, max_size=30), st.integers(0, 30))
def test_a_trend_that_was_stored_goes_on_alike(rule: AdaptiveLrSettings, losses: list[float], cut: int) -> None:
    whole = judged(rule, losses)
    first, before = judged(rule, losses[:cut])
    second, after = judged(rule, losses[cut:], Trend(**json.loads(json.dumps(vars(first)))))
    assert (second, before + after) == whole


def same(total: Tensor) -> Tensor:
    return total


def test_a_window_is_the_mean_of_its_updates_after_the_warm_up() -> None:
    """Windows of two after three updates of warm-up, one collective each: means 2, 2, 4."""
    sums: list[float] = []

    def counted(total: Tensor) -> Tensor:
        sums.append(float(total))
        return total

    rule = AdaptiveLrSettings(window_steps=2, plateau_windows=1, cooldown_windows=0, min_improvement=0.1)
    control = AdaptiveLr(rule, warmup_steps=3)
    seen = [
        control.observe(step, torch.tensor(loss, dtype=torch.float64), counted)
        for step, loss in enumerate([9.0, 9.0, 9.0, 1.0, 3.0, 2.0, 2.0, 4.0, 4.0], start=1)
    ]
    assert [action.kind if action else None for action in seen] == [*[None] * 4, "hold", None, "lower", None, "hold"]
    assert sums == [4.0, 4.0, 8.0]
    assert control.factor == 0.5


@given(st.lists(st.floats(0.1, 20), min_size=12, max_size=12), st.integers(0, 12))
def test_a_window_begun_is_taken_up_on_any_number_of_ranks(losses: list[float], stored: int) -> None:
    """Two ranks' halves; stored in between and taken up by one rank, or by two, the factor goes the same way."""
    rule = AdaptiveLrSettings(window_steps=3, plateau_windows=1, cooldown_windows=0)
    whole, halves = AdaptiveLr(rule, 0), [AdaptiveLr(rule, 0), AdaptiveLr(rule, 0)]
    one, two = AdaptiveLr(rule, 0), [AdaptiveLr(rule, 0), AdaptiveLr(rule, 0)]
    zero = torch.zeros((), dtype=torch.float64)
    for step, loss in enumerate(losses, start=1):
        if step == stored + 1:
            total = sum_of(halves)
            states = [rank.state(lambda _, total=total: total.clone(), leads=rank is halves[0]) for rank in halves]
            assert states[0] == states[1]
            state = json.loads(json.dumps(states[0]))
            one.load(state, True, zero)
            for rank in two:
                rank.load(state, rank is two[0], zero)
        together(halves, step, loss)
        whole.observe(step, zero + loss, same)
        if step > stored:
            one.observe(step, zero + loss, same)
            together(two, step, loss)
    for control in (*halves, *((one, *two) if stored < 12 else ())):
        assert control.trend.factor == whole.trend.factor
        assert control.trend.best == pytest.approx(whole.trend.best)


def sum_of(ranks: list[AdaptiveLr]) -> Tensor:
    return sum((rank._loss for rank in ranks if rank._loss is not None), torch.zeros((), dtype=torch.float64))


def together(ranks: list[AdaptiveLr], step: int, loss: float) -> None:
    """One update of two ranks that have a quarter and three quarters of its loss."""
    parts = [torch.tensor(loss / 4, dtype=torch.float64), torch.tensor(3 * loss / 4, dtype=torch.float64)]
    total = sum_of(ranks) + sum(parts)
    for rank, part in zip(ranks, parts, strict=True):
        rank.observe(step, part, lambda _: total.clone())


def written(folder: Path, text: str, name: str = "adaptive.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_of_thresholds(tmp_path: Path) -> None:
    assert read_adaptive_lr(written(tmp_path, "")) == RULE
    got = read_adaptive_lr(written(tmp_path, "window_steps: 5\nplateau_factor: 0.7\n"))
    assert (got.window_steps, got.plateau_factor, got.divergence_factor) == (5, 0.7, 0.25)
    assert read_adaptive_lr(written(tmp_path, '{"window_steps": 5, "plateau_factor": 0.7}', "a.json")) == got


@pytest.mark.parametrize(
    ("text", "hints"),
    [
        ("window_step: 5", ["window_step = 5", "is not a setting", "The nearest is window_steps"]),
        ("plateau_factor: 1.5", ["plateau_factor = 1.5", "below 1"]),
        ("window_steps: 0\nmin_factor: x", ["window_steps = 0", "min_factor = x", "is not a number"]),
        ("windows: 3\nmin_factor: 2", ["windows = 3", "min_factor = 2", "1 or less"]),
        ("divergence_factor: 0.9", ["divergence_factor = 0.9", "plateau_factor 0.5", "Give 0.5 or less"]),
        ("- a list", ["contains no settings by name"]),
        ("a: [", ["is not YAML"]),
        ("window_steps: 1\nwindow_steps: 2", ["is there twice"]),
    ],
)
def test_what_is_wrong_with_a_file(text: str, hints: list[str], tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        read_adaptive_lr(written(tmp_path, text))
    message = str(caught.value)
    assert all(hint in message for hint in [*hints, "--adaptive-lr-config"]), message
    assert "pydantic" not in message and "Input should" not in message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--adaptive-lr-config .*none.yaml: cannot be read"):
        read_adaptive_lr(tmp_path / "none.yaml")
