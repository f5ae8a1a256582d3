"""`hrm-ray recommend`: options that fit by the estimate, and the single changes that would make fit what does not."""

from __future__ import annotations

import json
import re

import pytest

from hrm_ray.cli.recommend import recommend_command
from hrm_ray.model.config import ModelConfig
from hrm_ray.search.optimize import CHUNKED
from hrm_ray.search.recommend import Asked, count_of, parameters_of, recommend, with_shape
from hrm_ray.settings.load import load_settings
from hrm_ray.settings.resolve import resolve_task
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.memory_estimate import MemoryAccount
from tests.support.runs import hrm, refused

SMALL = ("--hidden-size", "64", "--num-heads", "2", "--h-layers", "1", "--l-layers", "1", "--vocab-size", "512")


def asked_of(memory_bytes: int, **words: str | bool) -> Asked:
    flat = {f"--{name.replace('_', '-')}": value for name, value in words.items()}
    return Asked(resolve_task(load_settings({"--no-amp": True, **flat}), "lm"), 512, memory_bytes, "cuda")


@pytest.mark.parametrize(
    ("text", "number"),
    [("400M", 400_000_000), ("1.5b", 1_500_000_000), ("125000", 125_000), ("x", None), ("-1M", None)],
)
def test_a_number_of_parameters(text: str, number: int | None) -> None:
    assert parameters_of(text) == number


@pytest.mark.parametrize("parameters", [5_000_000, 50_000_000, 400_000_000, 3_000_000_000])
def test_an_architecture_of_about_so_many_parameters(parameters: int) -> None:
    settings = with_shape(asked_of(1, max_seq_len="128").settings, parameters, 16384)
    assert count_of(settings, 16384) == pytest.approx(parameters, rel=0.1)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates are computed here: those of the real model take seconds each."""

    def account(settings: RunSettings, config: ModelConfig, device: str) -> MemoryAccount:
        count, memory, workers = (
            count_of(settings, config.vocab_size),
            settings.memory,
            settings.cluster.world_size or 1,
        )
        token = 40 * config.hidden_size * (config.h_layers + config.l_layers)
        token = token // 2 if memory.gradient_checkpointing else token
        token = token // 4 if memory.use_chunked_training else token
        part = workers if settings.cluster.strategy == "zero3" else 1
        state = [
            4 * count // part,
            4 * count // part,
            (2 if settings.optimizer.use_8bit_optimizer else 8) * count // part,
        ]
        passes = token * config.seq_len * settings.optimizer.batch_size
        return MemoryAccount(*state, 0, 0, passes, sum(state) + passes)

    monkeypatch.setattr("hrm_ray.search.recommend._account", account)


@pytest.mark.usefixtures("simulated")
def test_the_largest_micro_batch_and_the_fewest_options_that_fit() -> None:
    words = dict(zip(("hidden_size", "num_heads", "h_layers", "l_layers"), ("64", "2", "1", "1"), strict=True))
    words |= {"max_seq_len": "512", "batch_size": "8"}
    whole = recommend(asked_of(10**9, **words))
    assert whole.point.batch_size == 8 and not whole.point.levers
    tight = recommend(asked_of(round(0.5 * whole.expected_bytes), **words))
    assert tight.point.batch_size < 8 and tight.expected_bytes <= 0.45 * whole.expected_bytes
    # The next larger micro-batch would not fit.
    tighter = asked_of(round(0.5 * whole.expected_bytes), **words)
    assert not tighter.fits(type(tight.point)(512, 2 * tight.point.batch_size, tight.point.levers))
    one_row = recommend(asked_of(round(1.2 * whole.expected_bytes / 8), **words))
    assert one_row.point.levers and CHUNKED in one_row.point.levers


def test_the_options_are_those_of_a_run_that_is_estimated_to_fit(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--memory", "1GB", "--context", "128", *SMALL, "--device", "cpu"]
    assert recommend_command(words) == 0
    said = capsys.readouterr().out
    options = re.search(r"^options (.*)$", said, re.MULTILINE)
    assert options is not None and "--max-seq-len 128 --batch-size 8" in options[1]
    assert "unknown, nobody has measured it" in said and "expects 0." in said
    ran = hrm("arch-summary", *options[1].split(), "--vocab-size", "512")
    assert ran.code == 0, ran.err
    assert recommend_command([*words, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["settings"]["optimizer.batch_size"] == 8 and plain["expected_bytes"] < 900_000_000


@pytest.mark.usefixtures("simulated")
def test_what_does_not_fit_names_single_changes_that_make_it_fit() -> None:
    asked = {"--memory": "24GB", "--parameters": "2B", "--context": "8192"}

    def words(changes: dict[str, str]) -> list[str]:
        return ["recommend", "--batch-size", "1", *(word for pair in {**asked, **changes}.items() for word in pair)]

    message = refused(4, *words({"--memory": "9GB"}), naming=("--memory 9.0GB", "at least", "context 8192", "Give"))
    asked["--memory"] = "9GB"
    assert len(message) < 300
    changes = dict(re.findall(r"(--[a-z-]+) (\S+?)(?= or|\.$)", message.partition("Give ")[2]))
    assert changes.keys() == {"--memory", "--parameters", "--world-size"}, message
    for option, value in changes.items():
        ran = hrm(*words({option: value}))
        assert ran.code == 0, (option, value, ran.err)
    # A context that is too long for a model which fits.
    asked.update({"--parameters": "400M", "--context": "200000", "--memory": "8GB"})
    message = refused(4, *words({}), naming=("--context",))
    context = re.search(r"--context (\d+)", message)
    assert context is not None and hrm(*words({"--context": context[1]})).code == 0


@pytest.mark.parametrize(
    ("words", "naming"),
    [
        (("--memory", "24"), ("--memory 24", "24GB")),
        (("--memory", "24GB", "--parameters", "lots"), ("--parameters lots", "400M")),
        (("--memory", "24GB", "--parameters", "1M", "--hidden-size", "64"), ("--parameters 1M", "--hidden-size")),
        (("--memory", "24GB", "--parameters", "1000"), ("--parameters 0.001M", "no architecture")),
        (("--memory", "24GB", "--context", "1"), ("--context 1", "2 or more")),
        (("--memory", "24GB", "--context", "64", "--max-seq-len", "64"), ("--context", "--max-seq-len")),
        (("--memory", "24GB", "--lr", "1"), ("--lr", "neither")),
    ],
)
def test_bad_values_are_refused(words: tuple[str, ...], naming: tuple[str, ...]) -> None:
    assert len(refused(2, "recommend", *words, naming=naming)) < 300
