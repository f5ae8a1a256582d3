"""Settings from four places become one tree, or one message with everything that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hrm_ray.errors import Fault, SettingsError
from hrm_ray.settings.load import load_settings, peek_leaves
from hrm_ray.settings.needs import NoEffect
from hrm_ray.settings.options import spellings
from hrm_ray.settings.tree import RunSettings, from_plain, to_dotted, to_plain


def refused(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(*args, **kwargs)
    return str(caught.value)


def yaml(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults() -> None:
    settings = load_settings({})
    assert settings == RunSettings()
    assert (settings.model.hidden_size, settings.optimizer.lr, settings.run.step_limit) == (512, 2e-4, 200)


def test_precedence_defaults_base_file_options_trial(tmp_path: Path) -> None:
    base = {"run.seed": 1, "run.keep": 1, "run.log_every": 1, "optimizer.batch_size": 1}
    file = yaml(tmp_path, "run: {keep: 2, log_every: 2}\noptimizer.batch_size: 2\n")
    settings = load_settings({"--log-every": "3", "--batch-size": "3"}, file, base, {"optimizer.batch_size": 4})
    assert (settings.run.save_every, settings.run.seed, settings.run.keep, settings.run.log_every) == (200, 1, 2, 3)
    assert settings.optimizer.batch_size == 4
    assert settings.given == {"run.keep", "run.log_every", "optimizer.batch_size"}


def test_stored_gpu_numbers_hold_only_on_gpus() -> None:
    stored = {"cluster.cuda_ids": "0,1", "cluster.device": "cuda"}
    on_cpu = load_settings({"--device": "cpu", "--world-size": "4"}, base=stored)
    assert on_cpu.cluster.cuda_numbers == ()
    assert load_settings({"--device": "cuda"}, base=to_dotted(on_cpu) | {"cluster.world_size": 2}).cluster.cuda_numbers
    assert "--cuda-ids 0 with --device cpu" in refused({"--device": "cpu", "--cuda-ids": "0"}, base=stored)


@pytest.mark.parametrize("name", ["--lr", "lr", "optimizer.lr", "--learning-rate", "learning_rate"])
def test_an_option_may_be_named_in_several_ways(name: str) -> None:
    assert load_settings({name: "1e-3"}).optimizer.lr == 1e-3


@pytest.mark.parametrize(
    ("option", "value", "key", "meant"),
    [
        ("--d-model", "64", "model.hidden_size", 64),
        ("--no-rope", True, "model.pos_encodings", "learned"),
        ("--model", "org/tok", "data.tokenizer_path", "org/tok"),
        ("--tokenizer-path", "tok", "data.tokenizer_path", "tok"),
        ("--seq-len", "33", "data.max_seq_len", 33),
        ("--learning-rate", "0.5", "optimizer.lr", 0.5),
        ("--save-dir", "a", "run.bundle_dir", Path("a")),
        ("--output-dir", "a", "run.bundle_dir", Path("a")),
        ("--flash-attn", True, "model.use_flash_attn", True),
        ("--no-flash-attn", True, "model.use_flash_attn", False),
        ("--no-peft", True, "adapt.use_peft", False),
        ("--no-lora", True, "adapt.use_peft", False),
        ("--no-packing", True, "data.packing", False),
        ("--per-device-train-batch-size", "4", "optimizer.batch_size", 4),
        ("--num-train-epochs", "3.0", "run.epochs", 3),
        ("--max-grad-norm", "0.5", "optimizer.grad_clip", 0.5),
        ("--logging-steps", "5", "run.log_every", 5),
        ("--train-file", "f", "data.dataset_file", "f"),
        ("--packing", "false", "data.packing", False),
        ("--retrain-tokenizer", True, "data.retrain_tokenizer", True),
        ("--no-ddp", True, "cluster.strategy", "single"),
        ("--ddp", True, "cluster.strategy", "ddp"),
        ("--zero-stage", "none", "cluster.strategy", None),
        ("--strategy", "ddp", "cluster.strategy", "ddp"),
        ("--cuda-ids", "0, 1", "cluster.cuda_ids", "0,1"),
        ("--optimizer", "adam-atan2", "optimizer.optimizer", "adam-atan2"),
    ],
)
def test_aliases_and_switches(option: str, value: str | bool, key: str, meant: object) -> None:
    settings = load_settings({option: value})
    assert settings.leaf(key) == meant
    assert settings.given == {key}


def test_every_fault_in_one_message(tmp_path: Path) -> None:
    file = yaml(tmp_path, "optimizer: {lrr: 1, beta1: 2}\nmodle: {h_layers: 3}\nrun.steps: none\n")
    message = refused(
        {"--batch-size": "0", "--hiden-size": "64", "--lr-schedule": "cosin", "--lr": True, "--lm-mask": "prefix"},
        file,
        trial={"optimizer.weight_decay": -1},
        found=[Fault("stray", "belongs to no option", "Leave it out")],
    )
    lines = message.splitlines()
    expected = [
        ("stray", "belongs to no option"),
        ("optimizer.lrr", "optimizer.lr"),
        ("modle", ""),
        ("--hiden-size:", "--hidden-size"),
        ("--lr", "needs a value"),
        ("--batch-size 0", "1 or more"),
        ("--lr-schedule cosin", "nearest is cosine"),
        ("optimizer.beta1 = 2", "below 1"),
        ("run.steps = none", "whole number"),
        ("optimizer.weight_decay = -1 (trial)", "0 or more"),
        ("--lm-mask prefix", "--prompt-column"),
    ]
    for value, hint in expected:
        assert any(line.startswith(value) and hint in line for line in lines), (value, message)
    assert len(lines) == len(expected)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("--hiden-size", "--hidden-size"),
        ("--d-modle", "--d-model"),
        ("--no-packin", "--no-packing"),
        ("--dry-rnu", "--dry-run"),
    ],
)
def test_unknown_options_name_the_nearest(name: str, nearest: str) -> None:
    assert nearest in refused({name: "1"}, also_known=["--dry-run"])


@pytest.mark.parametrize("name", ["--top-p", "--cloud", "--x", "--gpu"])
def test_names_that_only_begin_with_dashes_alike_are_not_near(name: str) -> None:
    assert "`--help` lists the options" in refused({name: "1"}, also_known=["--dry-run"])


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("model: {hidden-size: 64}", "model.hidden_size"),
        ("hidden_size: 64", "model.hidden_size"),
        ("data: {hidden_size: 64}", "model.hidden_size"),
        ("optimizer: adamw", "is a section"),
        ("model: {d_model: 64}", "model.hidden_size"),
        ("model: {xyzzy: 64}", "--help"),
        ("7: 8", "--help"),
    ],
)
def test_unknown_yaml_keys_name_the_nearest(tmp_path: Path, text: str, hint: str) -> None:
    message = refused({}, yaml(tmp_path, text))
    assert hint in message and len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("model: {h_layers: 1\n", "not YAML (line"),
        ("- a\n- b\n", "no settings by name"),
        ("run: {seed: 1}\nrun.seed: 2\n", "twice"),
        ("run: {seed: 1, seed: 2}\n", "twice"),
        ("model: {hidden_size: [1, 2]}", "not a whole number"),
        ("optimizer: {batch_size: true}", "is a boolean"),
        ("run: {brain_name: ''}", "is empty"),
        ("optimizer: {batch_size: null}", "not a whole number"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, hint: str) -> None:
    message = refused({}, yaml(tmp_path, text))
    assert hint in message and len(message.splitlines()) == 1


def test_unreadable_files(tmp_path: Path) -> None:
    assert "there is no such file" in refused({}, tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("run: {brain_name: caf\xe9}".encode("latin-1"))
    assert "UTF-8" in refused({}, tmp_path / "latin.yaml")


def test_yaml_values_as_people_write_them(tmp_path: Path) -> None:
    text = "run:\noptimizer: {lr: 2e-4, batch_size: 16}\ncluster: {cuda_ids: 0, ddp: yes}\nmodel.d_ff: null\n"
    settings = load_settings({}, yaml(tmp_path, text))
    assert (settings.optimizer.lr, settings.cluster.cuda_ids, settings.cluster.strategy) == (2e-4, "0", "ddp")
    assert settings.given == {"optimizer.lr", "optimizer.batch_size", "cluster.cuda_ids", "cluster.strategy"}
    assert load_settings({}, yaml(tmp_path, "# nothing\n")) == RunSettings()


@pytest.mark.parametrize("place", ["options", "file", "trial"])
def test_a_preset_fills_what_the_user_left_open(tmp_path: Path, place: str) -> None:
    file = yaml(tmp_path, "model: {hidden_size: 64}" + ("\nmodel.model_preset: tiny" if place == "file" else ""))
    options: dict[str, str | bool] = {"--h-layers": "1"} | ({"--model-preset": "tiny"} if place == "options" else {})
    settings = load_settings(options, file, None, {"model.model_preset": "tiny"} if place == "trial" else None)
    model = settings.model
    assert (model.hidden_size, model.h_layers, model.l_layers, model.num_heads, model.expansion) == (64, 1, 4, 4, 4.0)
    assert "model.expansion" not in settings.given


def test_presets_and_widths_and_layers() -> None:
    nano = load_settings({"--model-preset": "nano"}).model
    assert (nano.hidden_size, nano.num_heads, nano.h_layers, nano.l_layers, nano.expansion) == (128, 4, 2, 2, 4.0)
    assert load_settings({"--model-preset": "nano", "--d-ff": "100"}).model.d_ff == 100
    layered = load_settings({"--model-preset": "nano", "--num-layers": "8"}).model
    assert (layered.h_layers, layered.l_layers, layered.hidden_size) == (4, 4, 128)


def test_a_resumed_run_keeps_its_leaves_until_told_otherwise() -> None:
    options: dict[str, str | bool] = {"--model-preset": "tiny", "--num-layers": "4", "--d-ff": "100", "--resume": True}
    stored = to_dotted(load_settings(options))
    again = load_settings({"--steps": "9"}, base=stored)
    assert (again.model.hidden_size, again.model.num_layers, again.model.h_layers, again.model.d_ff) == (256, 4, 2, 100)
    assert again.given == {"run.steps"} and not again.run.resume
    wider = load_settings({"--model-preset": "nano"}, base=stored).model
    assert (wider.hidden_size, wider.num_layers, wider.h_layers, wider.d_ff) == (128, None, 2, None)
    assert load_settings({"--expansion": "2"}, base=stored).model.d_ff is None
    assert load_settings({"--h-layers": "1"}, base=stored).model.l_layers == 2
    other = load_settings({"--val-split": "test"}, base={"data.eval_file": "held_out"})
    assert other.data.eval_file is None


def test_a_resumed_run_of_another_version_is_refused() -> None:
    assert "resumed run" in refused({}, base={"model.not_yet": True})


def test_faulty_leaves_raise_no_second_fault() -> None:
    assert len(refused({"--num-heads": "x", "--hidden-size": "63"}).splitlines()) == 1
    assert len(refused({"--num-heads": "6", "--hiden-size": "384"}).splitlines()) == 1
    assert len(refused({"--model-preset": "nanoo", "--num-heads": "6"}).splitlines()) == 1


def test_of_two_spellings_of_one_option_the_later_counts() -> None:
    wider = load_settings({"--hidden-size": "64", "--d-model": "128"})
    assert wider.model.hidden_size == 128
    assert wider.overridden == (NoEffect("--hidden-size 64", "overridden by --d-model 128", "Give it once"),)
    assert load_settings({"--hidden-size": "64", "--d-model": "64"}).overridden == ()
    assert load_settings({"--amp": True, "--use-mixed-precision": True}).overridden == ()
    turned = load_settings({"--packing": True, "--no-packing": True})
    assert not turned.data.packing and [again.option for again in turned.overridden] == ["--packing"]
    assert "--packing: it has no effect here: overridden by --no-packing" in refused(
        {"--packing": True, "--no-packing": True, "--strict": True}
    )
    assert from_plain(to_plain(turned)) == turned


def test_every_spelling_of_a_switch_has_its_opposite() -> None:
    switches = {name: each for name, each in spellings().items() if each.fixed is not None}
    for name, spelling in switches.items():
        opposite = switches.get(f"--{name[5:]}" if name.startswith("--no-") else f"--no-{name[2:]}")
        assert opposite is not None, name
        assert opposite.option == spelling.option and opposite.fixed != spelling.fixed, name


@pytest.mark.parametrize(
    ("option", "value", "key", "meant"),
    [
        ("--streaming", "True", "data.streaming", True),
        ("--amp", "false", "memory.amp", False),
        ("--no-amp", "yes", "memory.amp", False),
        ("--no-amp", "off", "memory.amp", True),
        ("--no-moe", "True", "model.use_moe", False),
        ("--no-rope", "yes", "model.pos_encodings", "learned"),
        ("--ddp", "false", "cluster.strategy", "single"),
        ("--use-lora", "FALSE", "adapt.use_peft", False),
    ],
)
def test_a_boolean_word_after_a_switch(option: str, value: str, key: str, meant: object) -> None:
    assert load_settings({option: value}).leaf(key) == meant


def test_another_word_after_a_switch() -> None:
    assert "takes no value" in refused({"--no-rope": "learned"})
    assert "takes no value" in refused({"--no-moe": "maybe"})
    assert "neither true nor false" in refused({"--amp": "maybe"})


def test_peek_reads_a_few_leaves_whatever_else_is_wrong(tmp_path: Path) -> None:
    file = yaml(tmp_path, "run: {brain_name: b}\nnonsense: 1\n")
    peeked = peek_leaves(
        {"--resume": True, "--lr": "x", "--keep": "0"}, file, ("run.resume", "run.brain_name", "run.keep")
    )
    assert peeked == {"run.resume": True, "run.brain_name": "b", "run.keep": 3}


@pytest.mark.parametrize(
    ("options", "limit"), [({"--epochs": "2"}, None), ({"--steps": "5"}, 5), ({"--epochs": "2", "--steps": "5"}, 5)]
)
def test_the_step_limit(options: dict[str, str | bool], limit: int | None) -> None:
    assert load_settings(options).run.step_limit == limit
