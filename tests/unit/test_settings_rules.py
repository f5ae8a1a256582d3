"""Every rule between options refuses what it should, every option without effect is noted; both are skipped where an
option that they read is faulty."""

from __future__ import annotations

from typing import Any

import pytest

from hrm_ray.errors import SettingsError
from hrm_ray.settings.load import load_settings, read_options
from hrm_ray.settings.model import Task
from hrm_ray.settings.options import options
from hrm_ray.settings.resolve import resolve_task
from hrm_ray.settings.rules import RULES, as_note, broken_rules, watch, without_effect
from hrm_ray.settings.tree import SECTIONS, RunSettings, leaf_keys

Options = dict[str, str | bool]

PREFIX: Options = {"--lm-mask": "prefix", "--prompt-column": "p", "--response-column": "r"}

INDEPENDENT: Options = {"--parallel-independent": True}

EXAMPLES: dict[str, tuple[Options, Options, str]] = {
    "chunks_of_a_row": (
        {"--use-chunked-training": True, "--chunk-size": "128", "--max-seq-len": "128"},
        {"--use-chunked-training": True, "--chunk-size": "127", "--max-seq-len": "128"},
        "no more tokens than a chunk",
    ),
    "halting_of_several_segments": (
        {"--task": "lm", "--halt-max-steps": "1", "--halt-rule": "gain"},
        {"--task": "lm", "--halt-max-steps": "2", "--halt-rule": "gain"},
        "one segment",
    ),
    "stride_within_row": (
        {"--stride": "65", "--max-seq-len": "64"},
        {"--stride": "63", "--max-seq-len": "64"},
        "less than --stride 64",
    ),
    "stride_within_row_only": (
        {"--stride": "64", "--max-seq-len": "64"},
        {"--stride": "63", "--max-seq-len": "64"},
        "do not overlap",
    ),
    "stride_of_documents": ({"--stride": "8", **PREFIX}, {"--stride": "8"}, "never divided"),
    "chunk_within_block": (
        {"--dataset-chunk-size": "11", "--samples-per-block": "10"},
        {"--samples-per-block": "10"},
        "a block has fewer samples",
    ),
    "buffer_of_shuffled_data": (
        {"--shuffle-buffer-size": "8"},
        {"--shuffle-buffer-size": "8", "--no-linear-dataset": True},
        "read in order",
    ),
    "iterate_without_end": (
        {"--iterate": True, "--epochs": "2", "--lr-schedule": "constant"},
        {"--iterate": True, "--lr-schedule": "constant"},
        "one of the two",
    ),
    "iterate_with_steps": (
        {"--iterate": True, "--steps": "20"},
        {"--iterate": True, "--lr-schedule": "constant"},
        "as many epochs as it needs",
    ),
    "schedule_of_endless_run": (
        {"--stop-after-block": True},
        {"--stop-after-block": True, "--epochs": "3"},
        "--lr-schedule constant",
    ),
    "training_again_needs_a_run": (
        {"--force-train": True},
        {"--force-train": True, "--resume": True, "--epochs": "2"},
        "--resume",
    ),
    "new_ledger_of_resume": ({"--new-ledger": True}, {"--new-ledger": True, "--resume": True}, "a new ledger anyway"),
    "activations_of_float32_weights": (
        {"--activations": "bf16", "--model-dtype": "bf16"},
        {"--activations": "fp32", "--amp-dtype": "fp16"},
        "the type of the weights",
    ),
    "activations_of_weights": (
        {"--activations": "fp32", "--model-dtype": "bf16"},
        {"--activations": "bf16", "--model-dtype": "bf16"},
        "--model-dtype fp32",
    ),
    "one_type_of_16_bits": (
        {"--activations": "bf16", "--amp": True, "--amp-dtype": "fp16"},
        {"--activations": "bf16", "--amp": True, "--amp-dtype": "bf16"},
        "--amp-dtype bf16",
    ),
    "amp_dtype_of_amp": (
        {"--amp-dtype": "fp16", "--no-amp": True},
        {"--amp-dtype": "fp16"},
        "mixed precision is off",
    ),
    "heads_divide": (
        {"--num-heads": "6", "--hidden-size": "64"},
        {"--num-heads": "4", "--hidden-size": "64"},
        "--num-heads 4",
    ),
    "head_size_even": (
        {"--num-heads": "4", "--hidden-size": "12"},
        {"--num-heads": "4", "--hidden-size": "12", "--no-rope": True},
        "3",
    ),
    "layers_even": ({"--num-layers": "5"}, {"--num-layers": "6"}, "--num-layers 6"),
    "layers_once": ({"--num-layers": "4", "--h-layers": "1"}, {"--h-layers": "1"}, "--h-layers 1"),
    "width_once": ({"--d-ff": "64", "--expansion": "2"}, {"--d-ff": "64"}, "--expansion 2"),
    "gradient_within_segment": (
        {"--bp-steps": "7"},
        {"--bp-steps": "6", "--h-cycles": "2", "--l-cycles": "2"},
        "--bp-steps 6",
    ),
    "experts_to_choose_from": (
        {"--use-moe": True, "--num-experts": "4", "--num-experts-per-tok": "5"},
        {"--use-moe": True, "--num-experts": "4", "--num-experts-per-tok": "4"},
        "--num-experts-per-tok 4",
    ),
    "expert_starts_from_a_bundle": (
        {"--use-moe": True, "--expert-id": "e", "--expert-index": "0"},
        {"--use-moe": True, "--expert-id": "e", "--expert-index": "0", "--student-init": "b"},
        "--student-init BUNDLE",
    ),
    "expert_exists": (
        {"--use-moe": True, "--expert-id": "e", "--expert-index": "8", "--student-init": "b"},
        {"--use-moe": True, "--expert-id": "e", "--expert-index": "8", "--student-init": "b", "--num-experts": "9"},
        "--expert-index than 8",
    ),
    "expert_of_a_dense_model": (
        {"--expert-id": "e", "--expert-index": "0", "--student-init": "b", "--no-moe": True},
        {"--use-moe": True, "--expert-id": "e", "--expert-index": "0", "--student-init": "b"},
        "--expert-id e with --no-moe",
    ),
    "expert_without_adapters": (
        {"--use-moe": True, "--expert-id": "e", "--expert-index": "0", "--student-init": "b", "--use-peft": True},
        {"--student-init": "b", "--use-peft": True},
        "--use-peft",
    ),
    "expert_leaves_of_expert_training": (
        {"--experts-dir": "d"},
        {"--expert-index": "0", "--experts-dir": "d", "--expert-id": "e", "--student-init": "b", "--use-moe": True},
        "no single expert",
    ),
    "one_expert_is_trained": (
        {"--expert-index": "0"},
        {"--expert-index": "0", "--expert-id": "e", "--student-init": "b", "--use-moe": True},
        "--expert-id NAME",
    ),
    "blocks_for_text": (
        {"--task": "puzzle", "--stop-after-block": True, "--steps": "4"},
        {"--task": "lm", "--stop-after-block": True, "--steps": "4"},
        "no blocks",
    ),
    "puzzle_embedding_beside_one_expert": (
        {
            **{"--expert-id": "e", "--use-moe": True, "--expert-index": "0", "--student-init": "b"},
            **{"--puzzle-emb-ndim": "4", "--puzzle-emb-lr": "0.1"},
        },
        {"--puzzle-emb-ndim": "4", "--puzzle-emb-lr": "0.1"},
        "frozen",
    ),
    "expert_leaves_of_experts": (
        {"--no-moe": True, "--num-experts": "4"},
        {"--use-moe": True, "--num-experts": "4"},
        "--use-moe",
    ),
    "text_in_rollout": (
        {"--task": "lm", "--supervision": "segment"},
        {"--task": "puzzle", "--supervision": "segment"},
        "",
    ),
    "text_without_exploration": (
        {"--task": "lm", "--halt-exploration-prob": "0.5"},
        {"--task": "lm", "--halt-exploration-prob": "0"},
        "0.5",
    ),
    "exploration_has_room": (
        {"--halt-max-steps": "1", "--halt-exploration-prob": "0.5"},
        {"--halt-max-steps": "1"},
        "no other moment",
    ),
    "columns_or_messages": (
        {"--messages-column": "m", "--text-column": "t"},
        {"--messages-column": "m", "--lm-mask": "prefix"},
        "hold all of its text",
    ),
    "columns_need_prefix": ({"--prompt-column": "p"}, PREFIX, "Add --lm-mask prefix"),
    "prefix_names_columns": ({"--lm-mask": "prefix", "--prompt-column": "p"}, PREFIX, "--response-column is missing"),
    "prefix_has_two_columns": ({**PREFIX, "--response-column": "p"}, PREFIX, "copy"),
    "puzzle_without_prefix": ({"--task": "puzzle", **PREFIX}, {"--task": "lm", **PREFIX}, "full attention"),
    "window_for_text": (
        {"--task": "puzzle", "--window-size": "8"},
        {"--task": "lm", "--window-size": "8"},
        "--window-size 8",
    ),
    "window_within_row": (
        {"--window-size": "64", "--max-seq-len": "64"},
        {"--window-size": "63", "--max-seq-len": "64"},
        "--window-size 64",
    ),
    "chunks_for_text": (
        {"--task": "puzzle", "--use-chunked-training": True},
        {"--task": "lm", "--use-chunked-training": True},
        "full attention",
    ),
    "chunks_without_prefix": (
        {**PREFIX, "--use-chunked-training": True},
        {"--use-chunked-training": True},
        "--lm-mask causal",
    ),
    "chunk_leaves_of_chunked_training": (
        {"--chunk-size": "64", "--chunk-gradients": "exact", "--cpu-offload": True},
        {"--chunk-size": "64", "--chunk-gradients": "exact", "--use-chunked-training": True},
        "--chunk-size 64, --chunk-gradients exact and --cpu-offload (the sequence",
    ),
    "transformer_for_text": (
        {"--task": "puzzle", "--arch": "transformer"},
        {"--task": "lm", "--arch": "transformer"},
        "causal",
    ),
    "exploration_of_carried_puzzles": (
        {"--task": "puzzle", "--supervision": "rollout", "--halt-exploration-prob": "0.5"},
        {"--task": "puzzle", "--supervision": "segment", "--halt-exploration-prob": "0.5"},
        "--supervision segment",
    ),
    "puzzle_embedding_for_puzzles": (
        {"--task": "lm", "--puzzle-emb-ndim": "8"},
        {"--task": "puzzle", "--puzzle-emb-ndim": "8"},
        "8",
    ),
    "warmup_within_run": ({"--warmup-steps": "200"}, {"--warmup-steps": "200", "--epochs": "1"}, "--warmup-steps 199"),
    "workers_need_ray": (
        {"--launcher": "local", "--world-size": "2"},
        {"--launcher": "local", "--world-size": "1"},
        "--launcher ray",
    ),
    "workers_in_order": (
        {"--min-workers": "3", "--max-workers": "2"},
        {"--min-workers": "2", "--max-workers": "2"},
        "Give at most --min-workers 2",
    ),
    "fewer_workers_need_ray": (
        {"--launcher": "local", "--min-workers": "2"},
        {"--launcher": "local", "--min-workers": "1"},
        "--launcher ray",
    ),
    "more_workers_need_ray": (
        {"--launcher": "local", "--max-workers": "2"},
        {"--launcher": "local", "--max-workers": "1"},
        "--launcher ray",
    ),
    "single_stays_single": (
        {"--no-ddp": True, "--max-workers": "2"},
        {"--ddp": True, "--max-workers": "2"},
        "--strategy single with --max-workers 2",
    ),
    "strategy_without_adalora": (
        {"--strategy": "sharded-optimizer", "--student-init": "b", "--use-peft": True, "--peft-method": "adalora"},
        {"--strategy": "ddp", "--student-init": "b", "--use-peft": True, "--peft-method": "adalora"},
        "--strategy ddp",
    ),
    "fsdp_without_experts": (
        {"--strategy": "fsdp", "--use-moe": True},
        {"--strategy": "fsdp", "--no-moe": True},
        "--strategy zero3",
    ),
    "fsdp_with_float32_weights": (
        {"--strategy": "fsdp", "--no-moe": True, "--model-dtype": "bf16"},
        {"--strategy": "fsdp", "--no-moe": True, "--model-dtype": "fp32"},
        "--strategy zero3",
    ),
    "fsdp_with_wide_state": (
        {"--strategy": "fsdp", "--no-moe": True, "--use-8bit-optimizer": True},
        {"--strategy": "fsdp", "--no-moe": True},
        "--strategy sharded-optimizer",
    ),
    "fsdp_keeps_state_on_the_device": (
        {"--strategy": "fsdp", "--no-moe": True, "--optimizer-offload": True},
        {"--strategy": "fsdp", "--no-moe": True},
        "--strategy sharded-optimizer",
    ),
    "zero_trains_the_whole_model": (
        {"--zero-stage": "zero2", "--use-moe": True, "--expert-id": "e", "--expert-index": "0", "--student-init": "b"},
        {"--zero-stage": "none", "--use-moe": True, "--expert-id": "e", "--expert-index": "0", "--student-init": "b"},
        "--strategy zero2",
    ),
    "zero_with_wide_state": (
        {"--strategy": "zero1", "--use-8bit-optimizer": True},
        {"--strategy": "sharded-optimizer", "--use-8bit-optimizer": True},
        "--strategy sharded-optimizer",
    ),
    "zero_without_float16_weights": (
        {"--strategy": "zero3", "--model-dtype": "fp16"},
        {"--strategy": "zero3", "--model-dtype": "bf16"},
        "--model-dtype bf16",
    ),
    "zero_with_one_type_of_weights": (
        {"--strategy": "zero1", "--model-dtype": "bf16", "--student-init": "b", "--use-peft": True},
        {"--strategy": "ddp", "--model-dtype": "bf16", "--student-init": "b", "--use-peft": True},
        "--strategy sharded-optimizer",
    ),
    "zero_keeps_its_own_state": (
        {"--strategy": "zero1", "--optimizer-offload": True},
        {"--strategy": "sharded-optimizer", "--optimizer-offload": True},
        "--strategy sharded-optimizer",
    ),
    "independent_trainers_in_processes": (
        {**INDEPENDENT, "--launcher": "local"},
        {**INDEPENDENT, "--launcher": "ray"},
        "--launcher subprocess",
    ),
    "processes_for_independent_trainers": (
        {"--launcher": "subprocess"},
        {**INDEPENDENT, "--launcher": "subprocess"},
        "Give --parallel-independent",
    ),
    "independent_trainers_are_single": (
        {**INDEPENDENT, "--strategy": "ddp"},
        {**INDEPENDENT, "--strategy": "single"},
        "Leave --strategy out",
    ),
    "independent_trainers_come_and_go": (
        {**INDEPENDENT, "--min-workers": "1"},
        {**INDEPENDENT, "--world-size": "2"},
        "any --world-size",
    ),
    "batch_sizes_of_independent_trainers": (
        {"--world-size": "2", "--trainer-batch-sizes": "4,2"},
        {**INDEPENDENT, "--world-size": "2", "--trainer-batch-sizes": "4,2"},
        "Give one number",
    ),
    "batch_sizes_are_not_shared_out": (
        {**INDEPENDENT, "--world-size": "2", "--trainer-batch-sizes": "4,2", "--effective-batch-size": "8"},
        {**INDEPENDENT, "--world-size": "2", "--trainer-batch-sizes": "4,2"},
        "Leave one of them out",
    ),
    "processes_on_one_machine": (
        {**INDEPENDENT, "--launcher": "subprocess", "--ray-address": "a:1"},
        {**INDEPENDENT, "--ray-address": "a:1"},
        "leave the address out",
    ),
    "independent_trainers_train_the_whole_model": (
        {**INDEPENDENT, "--use-moe": True, "--expert-id": "e", "--expert-index": "0", "--student-init": "b"},
        {**INDEPENDENT, "--use-moe": True, "--student-init": "b"},
        "Leave --parallel-independent out",
    ),
    "independent_trainers_without_adalora": (
        {**INDEPENDENT, "--student-init": "b", "--use-peft": True, "--peft-method": "adalora"},
        {**INDEPENDENT, "--student-init": "b", "--use-peft": True, "--peft-method": "lora"},
        "another --peft-method",
    ),
    "independent_trainers_without_adaptive_lr": (
        {**INDEPENDENT, "--adaptive-lr-config": "a.yaml"},
        INDEPENDENT,
        "Leave --adaptive-lr-config out",
    ),
    "independent_trainers_keep_their_ledger": (
        {**INDEPENDENT, "--force-train": True},
        INDEPENDENT,
        "more --steps or --epochs",
    ),
    "merges_of_independent_trainers": (
        {"--merge-every": "50"},
        {**INDEPENDENT, "--merge-every": "50"},
        "only independent trainers are merged",
    ),
    "rate_of_an_outer_step": (
        {**INDEPENDENT, "--outer-optimizer": "none", "--outer-lr": "0.5"},
        {**INDEPENDENT, "--outer-lr": "0.5"},
        "--outer-optimizer none",
    ),
    "single_has_one_worker": (
        {"--no-ddp": True, "--world-size": "2"},
        {"--ddp": True, "--world-size": "1"},
        "--strategy single with --world-size 2",
    ),
    "strategy_of_workers_needs_ray": (
        {"--ddp": True, "--launcher": "local"},
        {"--ddp": True, "--launcher": "ray"},
        "--launcher ray",
    ),
    "address_needs_ray": ({"--launcher": "local", "--ray-address": "a:1"}, {"--ray-address": "a:1"}, "a:1"),
    "gpu_numbers_for_gpus": ({"--cuda-ids": "0", "--device": "cpu"}, {"--cuda-ids": "0"}, "--device cuda"),
    "gpu_for_each_worker": (
        {"--cuda-ids": "0,1", "--world-size": "3"},
        {"--cuda-ids": "0,1", "--world-size": "2"},
        "--world-size 2",
    ),
    "resume_one_way": ({"--resume": True, "--resume-from": "c"}, {"--resume-from": "c"}, "--resume"),
    "one_held_out_set": ({"--val-split": "v", "--eval-file": "f"}, {"--val-split": "v"}, "v"),
    "one_training_set": ({"--dataset-file": "f", "--dataset-id": "o/n"}, {"--dataset-id": "o/n"}, "--dataset-id o/n"),
    "hub_config_once": (
        {"--dataset-file": "hf://o/n:en", "--dataset-config": "fr"},
        {"--dataset-file": "hf://o/n::test", "--dataset-config": "fr"},
        "configuration en",
    ),
    "hub_split_once": (
        {"--dataset-file": "hf://o/n:en:test", "--split": "train"},
        {"--dataset-file": "hf://o/n:en:test"},
        "split test",
    ),
    "hub_id_is_one": ({"--dataset-id": "hf://o/n"}, {"--dataset-id": "o/n"}, "--dataset-file"),
    "hub_config_of_hub_data": (
        {"--dataset-file": "f", "--dataset-config": "en"},
        {"--dataset-id": "o/n", "--dataset-config": "en"},
        "--dataset-id",
    ),
    "cycles_of_transformer": ({"--arch": "transformer", "--h-cycles": "2"}, {"--arch": "transformer"}, "--h-cycles 2"),
    "rope_theta_of_rope": ({"--no-rope": True, "--rope-theta": "1e4"}, {"--rope-theta": "1e4"}, "rope"),
    "halt_margin_of_gain": ({"--halt-rule": "none", "--halt-margin": "0.1"}, {"--halt-margin": "0.1"}, "0.1"),
    "text_leaves_of_text": ({"--task": "puzzle", "--no-packing": True}, {"--task": "puzzle"}, "--no-packing"),
    "text_column_without_prefix": ({**PREFIX, "--text-column": "t"}, PREFIX, "--text-column t"),
    "training_of_own_tokenizer": (
        {"--model": "tok", "--vocab-size": "400", "--retrain-tokenizer": True},
        {"--model": "tok"},
        "--vocab-size 400 and --retrain-tokenizer (the tokenizer",
    ),
    "size_that_the_data_decides": (
        {"--auto-vocab-size": True, "--vocab-size": "400"},
        {"--auto-vocab-size": True, "--max-vocab-size": "6000"},
        "--vocab-size 400",
    ),
    "bounds_of_auto_vocabulary": (
        {"--min-vocab-size": "400", "--max-vocab-size": "500"},
        {"--min-vocab-size": "400", "--max-vocab-size": "500", "--auto-vocab-size": True},
        "--min-vocab-size 400 and --max-vocab-size 500 (the",
    ),
    "vocabulary_bounds_in_order": (
        {"--auto-vocab-size": True, "--min-vocab-size": "501", "--max-vocab-size": "500"},
        {"--auto-vocab-size": True, "--min-vocab-size": "500", "--max-vocab-size": "500"},
        "--min-vocab-size 500",
    ),
    "eval_batches_need_data": ({"--eval-batches": "3"}, {"--eval-batches": "3", "--eval-file": "f"}, "--eval-file"),
    "eval_every_needs_data_or_prompt": (
        {"--eval-every": "3"},
        {"--eval-every": "3", "--sample-prompt": "a"},
        "--eval-file",
    ),
    "decay_of_wsd": ({"--wsd-decay-ratio": "0.1"}, {"--wsd-decay-ratio": "0.1", "--lr-schedule": "wsd"}, "wsd"),
    "minimum_of_constant": (
        {"--lr-min-ratio": "0", "--lr-schedule": "constant"},
        {"--lr-schedule": "constant"},
        "constant",
    ),
    "moments_of_sgd": ({"--optimizer": "sgd", "--beta1": "0.8"}, {"--optimizer": "sgd"}, "--beta1 0.8"),
    "eight_bits_of_adamw": (
        {"--use-8bit-optimizer": True, "--optimizer": "sgd"},
        {"--use-8bit-optimizer": True},
        "--optimizer sgd",
    ),
    "one_quantised_load": (
        {"--load-in-8bit": True, "--load-in-4bit": True, "--use-peft": True},
        {"--load-in-8bit": True, "--use-peft": True},
        "--load-in-4bit",
    ),
    "quantised_needs_peft": ({"--load-in-4bit": True}, {"--load-in-4bit": True, "--use-lora": True}, "--use-peft"),
    "targets_exist": (
        {"--use-peft": True, "--lora-target-modules": "q_proj,up_proj", "--use-moe": True},
        {"--use-peft": True, "--lora-target-modules": "q_proj,up_proj", "--no-moe": True},
        "The layers are q_proj, k_proj, v_proj, o_proj",
    ),
    "adapter_leaves_of_peft": (
        {"--lora-rank": "4"},
        {"--lora-rank": "4", "--use-peft": True},
        "--use-peft",
    ),
    "ranks_of_matrices": (
        {"--use-peft": True, "--peft-method": "ia3", "--lora-r": "4"},
        {"--use-peft": True, "--peft-method": "ia3"},
        "factors",
    ),
    "offload_of_moments": (
        {"--optimizer-offload": True, "--optimizer": "sgd"},
        {"--optimizer-offload": True},
        "sgd",
    ),
    "puzzle_embedding_options": (
        {"--puzzle-emb-lr": "0.1"},
        {"--puzzle-emb-lr": "0.1", "--puzzle-emb-ndim": "4"},
        "--puzzle-emb-ndim",
    ),
}
"""Rule or condition -> options that break it, options that do not, and what its message says."""

NEEDS = {needs.name: needs for option in options().values() for needs in option.traits.needs}
"""The conditions of options to have an effect, by name."""


def test_every_rule_has_an_example() -> None:
    assert {*RULES, *NEEDS} == set(EXAMPLES)


@pytest.mark.parametrize("name", RULES)
def test_the_rule_refuses(name: str) -> None:
    bad, _, hint = EXAMPLES[name]
    with pytest.raises(SettingsError) as caught:
        load_settings(bad)
    own, _ = watch(RULES[name], unchecked(bad))
    assert own in caught.value.faults
    assert own is not None and hint in str(own) and "{" not in str(own)


@pytest.mark.parametrize("name", NEEDS)
def test_an_option_without_effect_is_noted_and_refused_when_strict(name: str) -> None:
    bad, _, said = EXAMPLES[name]
    note = as_note(without_effect(load_settings(bad)))
    assert NEEDS[name].because in note and said in f"{note} {NEEDS[name].hint}"
    with pytest.raises(SettingsError, match="it has no effect here: ") as caught:
        load_settings({**bad, "--strict": True})
    assert all(NEEDS[name].because in str(fault) for fault in caught.value.faults)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_rule_passes(name: str) -> None:
    load_settings(EXAMPLES[name][1])


@pytest.mark.parametrize("name", NEEDS)
def test_an_option_that_was_not_given_is_never_noted(name: str) -> None:
    settings = unchecked(EXAMPLES[name][0])
    assert without_effect(settings)
    assert without_effect(settings.model_copy(update={"given": frozenset()})) == []


@pytest.mark.parametrize("key", [key for key, option in options().items() if option.traits.needs])
def test_every_option_is_noted_where_what_it_needs_is_missing(key: str) -> None:
    """Given alone, also where the example gives other options of the same condition."""
    for needs in options()[key].traits.needs:
        settings = unchecked(EXAMPLES[needs.name][0]).model_copy(update={"given": frozenset({key})})
        (noted,) = without_effect(settings)
        assert noted.option.startswith((options()[key].flag, options()[key].off_flag)), needs.name
        assert not needs.holds(settings)


def test_a_launcher_that_independent_trainers_lack_is_one_fault() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({**INDEPENDENT, "--launcher": "local", "--world-size": "2"})
    assert [fault.hint for fault in caught.value.faults] == ["Give --launcher subprocess or ray, or leave it out"]


def test_an_option_that_lacks_two_things_is_noted_once() -> None:
    """The first reason; options with the same one stand together."""
    settings = load_settings({"--no-moe": True, "--num-experts": "8", "--num-experts-per-tok": "2", "--lora-r": "16"})
    expected = "--num-experts 8 and --num-experts-per-tok 2 (the model has no experts), --lora-r 16 (the model has no"
    assert expected in as_note(without_effect(settings))
    ia3 = load_settings({"--lora-r": "16", "--peft-method": "ia3"})
    assert [noted.option for noted in without_effect(ia3)] == ["--peft-method ia3", "--lora-r 16"]


@pytest.mark.parametrize("task", ["lm", "puzzle"])
def test_a_form_may_write_every_default(task: Task) -> None:
    """As forms do that write all their settings into a command line: nothing is refused."""
    spelt_out: Options = {
        option.flag: option.default if option.is_switch else str(option.default)
        for option in options().values()
        if option.default is not None
    }
    noted = without_effect(resolve_task(load_settings(spelt_out), task, 16))
    assert {"--no-cpu-offload", "--lora-r 16", "--num-experts 8"} <= {each.option for each in noted}


def test_a_default_that_is_spelt_out_is_no_note_where_it_acts() -> None:
    spelt_out: Options = {
        option.flag: option.default if option.is_switch else str(option.default)
        for option in options().values()
        if option.default is not None and not option.traits.needs
    }
    assert without_effect(load_settings(spelt_out)) == []


def test_every_option_without_a_default_says_what_holds_then() -> None:
    assert [key for key, option in options().items() if option.default is None and not option.traits.unset] == []


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_skipped_when_an_option_that_it_read_is_faulty(name: str) -> None:
    settings = unchecked(EXAMPLES[name][0])
    fault, reads = watch(RULES[name], settings)
    assert fault in broken_rules(settings)
    assert reads and reads <= set(leaf_keys())
    for key in reads:
        assert fault not in broken_rules(settings, {key})


@pytest.mark.parametrize("name", NEEDS)
def test_a_note_is_skipped_when_an_option_that_its_condition_read_is_faulty(name: str) -> None:
    settings = unchecked(EXAMPLES[name][0])
    _, reads = watch(NEEDS[name].holds, settings)
    assert reads and reads <= set(leaf_keys())
    for key in reads:
        assert NEEDS[name].because not in as_note(without_effect(settings, {key}))


def test_the_reads_of_a_rule_include_those_of_a_property() -> None:
    _, reads = watch(RULES["warmup_within_run"], unchecked({"--warmup-steps": "200"}))
    assert {"run.steps", "run.epochs", "run.iterate", "optimizer.warmup_steps"} <= reads


def unchecked(options: Options) -> RunSettings:
    """The tree that the options mean, with no rule applied."""
    values = read_options(options).values
    nested: dict[str, Any] = {section: {} for section in SECTIONS}
    for key, value in values.items():
        nested[key.partition(".")[0]][key.partition(".")[2]] = value
    return RunSettings.model_validate({**nested, "given": frozenset(values)})
