"""The tree survives the ways it travels: as JSON, as dotted keys, as options; and wrong values do not get in."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hrm_ray.errors import SettingsError
from hrm_ray.settings.load import load_settings
from hrm_ray.settings.options import options
from hrm_ray.settings.resolve import resolve_task
from hrm_ray.settings.tree import RunSettings, from_plain, leaf_keys, to_dotted, to_plain
from tests.support.said import to_options

WHOLE = st.integers(1, 10**6)
SHARE = st.floats(0.01, 0.99)
NAME = st.text("abcdefgXYZ0189_-", min_size=1, max_size=12).filter(lambda text: not text.startswith("-"))

LEAVES: dict[str, st.SearchStrategy[Any]] = {
    "task": st.sampled_from(["lm", "puzzle"]),
    "h_layers": WHOLE,
    "rope_theta": st.floats(1, 1e6),
    "rms_norm_eps": st.floats(1e-12, 1e-2),
    "supervision": st.just("rollout"),
    "loss": st.sampled_from(["softmax", "stablemax"]),
    "student_init": NAME.map(Path),
    "dataset_file": NAME,
    "split": NAME,
    "linear_dataset": st.booleans(),
    "max_seq_len": st.integers(2, 10**6),
    "batch_size": WHOLE,
    "lr": st.floats(1e-300, 1e6),
    "weight_decay": st.floats(0, 10),
    "lr_min_ratio": SHARE,
    "ema": SHARE,
    "optimizer": st.sampled_from(["adamw", "adam-atan2", "sgd"]),
    "world_size": WHOLE,
    "strategy": st.just("ddp"),
    "strict": st.booleans(),
    "brain_name": NAME,
    "steps": WHOLE,
    "epochs": WHOLE,
    "seed": st.integers(0, 2**63 - 1),
    "stop_file": NAME.map(Path),
    "resume": st.booleans(),
}
KEY_OF = {key.partition(".")[2]: key for key in leaf_keys()}
trees = st.fixed_dictionaries({}, optional=LEAVES).map(
    lambda leaves: load_settings({}, trial={KEY_OF[name]: value for name, value in leaves.items()})
)


@given(trees)
def test_plain_values_and_back(settings: RunSettings) -> None:
    assert from_plain(json.loads(json.dumps(to_plain(settings)))) == settings
    assert pickle.loads(pickle.dumps(settings)) == settings


@given(trees)
def test_dotted_keys_as_the_base_of_a_resumed_run(settings: RunSettings) -> None:
    dotted = to_dotted(settings)
    assert list(dotted) == list(leaf_keys())
    again = load_settings({}, base=json.loads(json.dumps(dotted)))
    assert again.given == frozenset()
    run = settings.run.model_copy(update={"resume": False, "resume_from": None})
    assert again == settings.model_copy(update={"given": frozenset(), "run": run, "complete": True})


@given(trees)
def test_options_and_back(settings: RunSettings) -> None:
    said = {name: value for name, value in to_options(settings).items() if _key(name) in settings.given}
    assert load_settings(said) == settings


def _key(flag: str) -> str:
    return next(key for key, option in options().items() if option.flag == flag)


OUT_OF_RANGE = {
    "--h-layers": ["0", "-1", "1.5", "x", ""],
    "--num-layers": ["0", "3"],
    "--hidden-size": ["0"],
    "--expansion": ["0", "inf", "nan"],
    "--bp-steps": ["0"],
    "--halt-max-steps": ["0"],
    "--halt-exploration-prob": ["-0.1", "1.1"],
    "--halt-margin": ["-1"],
    "--pos-encodings": ["rotary"],
    "--vocab-size": ["299"],
    "--max-seq-len": ["1"],
    "--batch-size": ["0", "8.5", "true"],
    "--lr": ["0", "-1", "nan", "inf", "fast"],
    "--beta1": ["1", "-0.1"],
    "--lr-min-ratio": ["1.01"],
    "--ema": ["0", "1"],
    "--grad-clip": ["-1"],
    "--max-bad-steps": ["0"],
    "--world-size": ["0"],
    "--cuda-ids": ["a", "0,,1", "-1", "1,1", "0 1"],
    "--brain-name": ["a/b", "..", "a:b", "a.", " "],
    "--steps": ["0"],
    "--keep": ["0"],
    "--seed": ["-1", str(2**63)],
    "--packing": ["perhaps"],
    "--device": ["gpu"],
}


@pytest.mark.parametrize(
    ("option", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
)
def test_values_out_of_range(option: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({option: value})
    (fault,) = caught.value.faults
    assert fault.value == f"{option} {value or repr(value)}"
    assert (
        fault.reason
        and (fault.hint or "must be" in fault.reason)
        and "pydantic" not in str(fault)
        and "Input should" not in str(fault)
    )


def test_a_bound_is_said_in_one_sentence() -> None:
    for words, message in (
        ({"--lr": "-1"}, "--lr -1: must be above 0."),
        ({"--keep": "0"}, "--keep 0: must be 1 or more."),
        ({"--dropout-rate": "1"}, "--dropout-rate 1: must be below 1."),
        ({"--wsd-decay-ratio": "2"}, "--wsd-decay-ratio 2: must be 1 or less."),
    ):
        with pytest.raises(SettingsError) as caught:
            load_settings(words)
        assert str(caught.value) == message


def test_frozen_and_closed() -> None:
    settings = RunSettings()
    with pytest.raises(ValidationError):
        settings.optimizer.lr = 1.0  # type: ignore[misc]
    with pytest.raises(SettingsError, match=r"model\.not_yet"):
        from_plain({"model": {"not_yet": True}})
    with pytest.raises(SettingsError, match=r"optimizer\.lr = -1"):
        from_plain({"optimizer": {"lr": -1}})


def test_text_resolves() -> None:
    settings = resolve_task(load_settings({}), "lm")
    model = settings.model
    assert (model.task, model.supervision, model.halt_exploration_prob, model.loss) == ("lm", "rollout", 0.0, "softmax")
    assert settings.data.max_seq_len == 128
    assert resolve_task(load_settings({"--loss": "stablemax", "--seq-len": "9"}), "lm").model.loss == "stablemax"


@pytest.mark.parametrize(
    ("words", "bounds"),
    [({"--max-vocab-size": "400"}, (400, 400)), ({"--min-vocab-size": "60000"}, (60000, 60000)), ({}, (5000, 50000))],
)
def test_a_bound_of_the_vocabulary_that_is_a_default_gives_way(
    words: dict[str, str | bool], bounds: tuple[int, int]
) -> None:
    data = resolve_task(load_settings({"--auto-vocab-size": True, **words}), "lm").data
    assert (data.min_vocab_size, data.max_vocab_size) == bounds


def test_puzzles_resolve() -> None:
    settings = resolve_task(load_settings({"--task": "puzzle"}), "puzzle", 81)
    model = settings.model
    assert (model.supervision, model.halt_exploration_prob, model.loss) == ("segment", 0.1, "stablemax")
    assert settings.data.max_seq_len == 81 and settings.given == {"model.task"}
    assert resolve_task(settings, "puzzle", 81) == settings
    assert resolve_task(load_settings({"--supervision": "rollout"}), "puzzle", 16).model.supervision == "rollout"


@pytest.mark.parametrize(
    ("said", "task", "hints"),
    [
        ({"--task": "lm"}, "puzzle", ["the data is puzzles"]),
        ({"--task": "puzzle"}, "lm", ["the data is text"]),
        ({"--seq-len": "80"}, "puzzle", ["81 tokens"]),
        ({"--task": "lm", "--seq-len": "80"}, "puzzle", ["the data is puzzles", "81 tokens"]),
        ({"--supervision": "segment", "--halt-exploration-prob": "0.2"}, "lm", ["--supervision segment", "0.2"]),
        ({"--puzzle-emb-ndim": "4"}, "lm", ["no puzzle identifiers"]),
        ({"--vocab-size": "500", "--arch": "transformer"}, "puzzle", ["--arch transformer"]),
    ],
)
def test_what_contradicts_the_data(said: dict[str, str | bool], task: Any, hints: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve_task(load_settings(said), task, 81 if task == "puzzle" else None)
    assert len(caught.value.faults) == len(hints)
    assert all(hint in str(caught.value) for hint in hints)
