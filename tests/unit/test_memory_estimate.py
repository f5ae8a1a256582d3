"""The memory estimate is what an update takes: to the byte of its tensors, and near its resident memory."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest
import torch

from hrm_ray.launch.preflight import checkpoint_bytes, least_bytes, most_bytes
from hrm_ray.train.fake_tensors import fake_tensors
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.memory_estimate import DEEPSPEED, DIVIDED, MemoryAccount, account_for, memory_estimate
from hrm_ray.train.microbatch import to_batch
from hrm_ray.train.strategies.zero import reduce_bucket_values
from tests.support.measured_memory import case_of, loop_of, measured_bytes

Options = dict[str, str | bool]
Case = tuple[Options, int]

TEXT: Options = {"--task": "lm", "--no-moe": True, "--no-amp": True, "--hidden-size": "256", "--num-heads": "4"}
TEXT |= {"--num-layers": "4", "--h-cycles": "1", "--max-seq-len": "256", "--batch-size": "16"}
TEXT |= {"--gradient-checkpointing": True}
PUZZLE: Options = {**TEXT, "--task": "puzzle", "--max-seq-len": "81", "--batch-size": "64"}
PEFT: dict[str, str | bool] = {"use_peft": True, "hidden_size": "1024", "batch_size": "4"}


def case(base: Options, vocab_size: int = 2000, **changes: str | bool) -> Case:
    """The base's options with some changed; a switch takes the place of its contrary."""
    said = {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    contrary = {"--no-moe" if name == "--use-moe" else f"--no-{name[2:]}" for name in said}
    contrary |= {f"--{name[5:]}" for name in said if name.startswith("--no-")}
    return {name: value for name, value in base.items() if name not in contrary} | said, vocab_size


CASES: dict[str, Case] = {
    "text": case(TEXT),
    "text, no checkpointing": case(TEXT, no_gradient_checkpointing=True),
    "text, amp": case(TEXT, amp=True),
    "text, amp, no checkpointing": case(TEXT, amp=True, no_gradient_checkpointing=True),
    "text, all updates with gradient": case(TEXT, bp_steps="3", no_gradient_checkpointing=True, batch_size="8"),
    "text, long rows": case(TEXT, max_seq_len="2048", batch_size="2"),
    "text, window": case(TEXT, max_seq_len="2048", batch_size="2", window_size="128"),
    "text, chunks": case(TEXT, max_seq_len="4096", batch_size="2", use_chunked_training=True, chunk_size="512"),
    "text, large vocabulary": case(TEXT, 50_000, batch_size="4"),
    "text, accumulated": case(TEXT, gradient_accumulation_steps="4"),
    "text, wide": case(TEXT, hidden_size="768", batch_size="4"),
    "text, wide, bf16 weights": case(TEXT, hidden_size="1024", batch_size="4", model_dtype="bf16"),
    "text, wide, 8-bit optimizer": case(TEXT, hidden_size="1024", batch_size="2", use_8bit_optimizer=True),
    "text, wide, adam-atan2, averaged": case(
        TEXT, hidden_size="1024", batch_size="2", optimizer="adam-atan2", ema="0.9"
    ),
    "text, wide, sgd": case(TEXT, hidden_size="1024", batch_size="4", optimizer="sgd"),
    "text, experts": case(TEXT, use_moe=True, batch_size="8"),
    "text, experts, amp": case(TEXT, use_moe=True, amp=True, batch_size="8"),
    "text, adapters on int8": case(TEXT, **PEFT, load_in_8bit=True),
    "transformer": case({name: value for name, value in TEXT.items() if name != "--h-cycles"}, arch="transformer"),
    "puzzle": case(PUZZLE, 12),
    "puzzle, no checkpointing": case(PUZZLE, 12, no_gradient_checkpointing=True),
    "puzzle, carried, accumulated": case(PUZZLE, 12, gradient_accumulation_steps="6"),
    "puzzle, rollout, embedding": case(PUZZLE, 12, supervision="rollout", puzzle_emb_ndim="256", batch_size="96"),
}
"""A grid over what decides memory; from 180 MB to 1 GB, beside which what a process varies by is little."""

SMALL: Options = {"--hidden-size": "64", "--num-heads": "2", "--num-layers": "2", "--batch-size": "3"}
MORE: dict[str, Case] = {
    "adalora": case(TEXT, use_peft=True, peft_method="adalora"),
    "ia3 on nf4": case(TEXT, use_peft=True, peft_method="ia3", load_in_4bit=True),
    "fp16 weights, dropout": case(TEXT, model_dtype="fp16", dropout_rate="0.1", activation="gelu", no_swiglu=True),
    "exact chunks": case(
        TEXT, max_seq_len="300", use_chunked_training=True, chunk_size="50", chunk_gradients="exact", window_size="60"
    ),
    "prefix": case(TEXT, lm_mask="prefix", prompt_column="p", response_column="r"),
    "transformer, bf16 weights": case(
        {name: value for name, value in TEXT.items() if name != "--h-cycles"}, arch="transformer", model_dtype="bf16"
    ),
    "learned positions, one segment": case(TEXT, no_rope=True, halt_max_steps="1", gradient_accumulation_steps="3"),
}


def small(chosen: Case) -> Case:
    """The same in a size that a test takes no time with, however long its rows."""
    options = {**chosen[0], **SMALL}
    if options["--task"] == "lm":
        options["--max-seq-len"] = "320" if "--window-size" in options or "--use-chunked-training" in options else "24"
        options |= {name: "40" for name in ("--chunk-size", "--window-size") if name in options}
    return options, min(chosen[1], 500)


def real_account(chosen: Case) -> MemoryAccount:
    loop: TrainingLoop = loop_of(*chosen)
    shape, parts = loop.parts.shape, loop.parts
    offered = parts.loader.next_batch([torch.ones(shape.batch_size, dtype=torch.bool).numpy()] * shape.accumulation, 1)
    batches = [to_batch(columns, parts.wanted, loop.world.device) for columns in offered]
    return account_for(loop, batches)


@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_it_is_as_real_tensors_are(name: str) -> None:
    """Everything that stays is equal to the byte. So are activations, but where what lives depends on values: how many
    tokens an expert gets, where documents begin; 5 % of the peak at most."""
    chosen = small({**CASES, **MORE}[name])
    settings, config = case_of(*chosen)
    real, estimated = real_account(chosen), memory_estimate(settings, config)
    for field in ("weights_bytes", "gradients_bytes", "optimizer_bytes", "average_bytes", "carries_bytes"):
        assert getattr(estimated, field) == getattr(real, field), field
    assert estimated.activations_bytes == pytest.approx(real.activations_bytes, abs=0.05 * real.peak_bytes)
    assert estimated.peak_bytes == pytest.approx(real.peak_bytes, rel=0.05)
    assert least_bytes(settings, config) <= estimated.peak_bytes <= most_bytes(settings, config)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark of resident memory is read from Linux")
@pytest.mark.parametrize("name", CASES)
def test_the_process_takes_what_was_said(name: str) -> None:
    """Within 15 % of what resident memory rises by in a fresh process that gives freed memory back."""
    chosen = CASES[name]
    assert memory_estimate(*case_of(*chosen)).peak_bytes == pytest.approx(measured_bytes(*chosen), rel=0.15)


def test_it_allocates_nothing_and_ends() -> None:
    """A billion parameters in 2048 dimensions on 65,536 tokens: 4 GB of weights. Half a CPU minute is much for it."""
    words = {"--task": "lm", "--model-preset": "xlarge", "--max-seq-len": "65536"}
    words |= {"--gradient-checkpointing": True, "--amp": True}
    settings, config = case_of(words, 16_000)
    before_bytes, start_s = psutil.Process().memory_info().rss, time.process_time()
    account = memory_estimate(settings, config)
    assert psutil.Process().memory_info().rss - before_bytes < 300e6
    assert time.process_time() - start_s < 60
    assert account.weights_bytes > 3.9e9 and account.peak_bytes > 4 * account.weights_bytes
    # One square of the sequence, even in a single byte for a pair, would be 8 times 4.3 GB for a batch of 8.
    assert account.activations_bytes < 8 * 65536 * (2048 * 4 * 40)


def test_what_further_micro_batches_keep_is_added() -> None:
    """Carried puzzles keep a carry each, and its successor beside it while a step runs; text keeps the columns only."""
    for base, vocab in ((PUZZLE, 12), (TEXT, 500)):
        few, many = (
            memory_estimate(*case_of(*small(case(base, vocab, gradient_accumulation_steps=number))))
            for number in ("4", "16")
        )
        assert many.activations_bytes == few.activations_bytes
        assert many.carries_bytes == 4 * few.carries_bytes
        columns = 12 * (3 * 24 * 4 * 4 if base is TEXT else 3 * 81 * 4 * 4)
        assert 0 < many.peak_bytes - few.peak_bytes - 2 * (many.carries_bytes - few.carries_bytes) <= columns


@pytest.mark.parametrize("gradients", ["truncated", "exact"])
def test_chunks_add_up(gradients: str) -> None:
    """Rows of 25 chunks are told from rows of 4 and 3, and are what going through all of them gives: 8 %, since where
    the exact gradient's peak is changes with their number."""
    options, vocab_size = small(CASES["text, chunks"])
    chosen = {**options, "--max-seq-len": "1000", "--chunk-gradients": gradients}, vocab_size
    told, real = memory_estimate(*case_of(*chosen)), real_account(chosen)
    assert told.peak_bytes == pytest.approx(real.peak_bytes, rel=0.08)
    assert told.weights_bytes == pytest.approx(real.weights_bytes, rel=1e-3)


@pytest.mark.parametrize("gradients", ["truncated", "exact"])
def test_windows_over_many_chunks_add_up(gradients: str) -> None:
    """Rows of 25 chunks and a window over 12 are told from rows of 8 and windows over 4."""
    options, vocab_size = small(CASES["text, chunks"])
    options |= {"--max-seq-len": "1000", "--window-size": "490", "--chunk-gradients": gradients}
    told, real = memory_estimate(*case_of(options, vocab_size)), real_account((options, vocab_size))
    assert told.peak_bytes == pytest.approx(real.peak_bytes, rel=0.1)
    assert told.activations_bytes == pytest.approx(real.activations_bytes, rel=0.12)


def test_gradients_of_several_workers_are_float32() -> None:
    """A step of one pass keeps narrow gradients; those of several workers are added in float32."""
    one, two = (
        memory_estimate(*case_of(*small(case(MORE["transformer, bf16 weights"][0], world_size=number))))
        for number in ("1", "2")
    )
    assert one.gradients_bytes == one.weights_bytes - 2 * 24 * 32 * 4  # without the rotary table, a float32 buffer
    assert two.gradients_bytes == 2 * one.gradients_bytes


@pytest.mark.parametrize("strategy", [*DIVIDED])
def test_a_strategy_divides_what_it_says(strategy: str) -> None:
    """Of three workers, of whom the preflight asks no more; tests/benchmarks/bench_strategies.py measures the same."""
    options, vocab_size = small(case(TEXT, optimizer="adamw", ema="0.9"))
    chosen = [case_of(options | {"--world-size": "3", "--strategy": name}, vocab_size) for name in ("ddp", strategy)]
    accounts = [memory_estimate(settings, config) for settings, config in chosen]
    for (settings, config), account in zip(chosen, accounts, strict=True):
        assert 0.5 * account.peak_bytes < least_bytes(settings, config) <= account.peak_bytes
    whole, part = ({name: size for name, size in account.to_plain().items() if size} for account in accounts)
    values = whole["optimizer_bytes"] // 8
    expected = {name: whole[name] / (3 if name.removesuffix("_bytes") in DIVIDED[strategy] else 1) for name in whole}
    if strategy in DEEPSPEED:
        expected["weights_bytes"] += 4 * values / 3
        expected["gradients_bytes"] += 4 * reduce_bucket_values(values)
    told = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "average_bytes")
    assert {name: part[name] for name in told} == pytest.approx({name: expected[name] for name in told}, rel=2e-3)


def test_deepspeed_keeps_float32_copies_of_bf16_weights() -> None:
    """And adds gradients in float32, with one worker too; stage 2 reduces them in bf16."""
    options, vocab_size = small(case(TEXT, optimizer="adamw", model_dtype="bf16"))
    whole = memory_estimate(*case_of(options, vocab_size))
    for strategy, number in (("zero1", 1), *((strategy, 2) for strategy in sorted(DEEPSPEED))):
        settings, config = case_of(options | {"--world-size": str(number), "--strategy": strategy}, vocab_size)
        part, values = memory_estimate(settings, config), whole.optimizer_bytes // 8
        bucket = (2 if strategy == "zero2" else 4) * reduce_bucket_values(values)
        gradients = 4 * values / (number if "gradients" in DIVIDED[strategy] else 1)
        weights = whole.weights_bytes / (number if "weights" in DIVIDED[strategy] else 1)
        assert part.gradients_bytes == pytest.approx(gradients + bucket, rel=2e-3)
        assert part.weights_bytes == pytest.approx(weights + 4 * values / number, rel=2e-3)
        assert checkpoint_bytes(settings, config) == pytest.approx(12 * values, rel=1e-3)
        assert least_bytes(settings, config) <= part.peak_bytes


def test_the_bucket_of_gradients_is_small_beside_them() -> None:
    sizes = (100, 10**6, 3 * 10**6, 10**9)
    assert [reduce_bucket_values(size) for size in sizes] == [100, 2**18, 375_000, 8 * 2**20]


def test_state_in_host_memory_is_not_in_the_peak() -> None:
    settings, config = case_of(*small(case(TEXT, optimizer_offload=True)))
    here, offloaded = memory_estimate(settings, config), memory_estimate(settings, config, "cuda")
    assert here.optimizer_bytes == offloaded.optimizer_bytes
    embedding = 2 * 4 * 500 * 64
    saved = here.peak_bytes - offloaded.peak_bytes
    assert here.optimizer_bytes - 1.1 * embedding < saved < here.optimizer_bytes


def test_an_estimate_changes_nothing_in_the_process() -> None:
    """Random numbers go on as they were, and modules are moved as ever, also after one that failed."""
    state, apply = torch.get_rng_state(), torch.nn.Module._apply
    settings, config = case_of(*small(CASES["text"]))
    memory_estimate(settings, config)
    with pytest.raises((RuntimeError, ValueError, ZeroDivisionError, AssertionError)):
        memory_estimate(settings, replace(config, num_heads=3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.nn.Module._apply is apply
    assert torch.ones(2).add(1).tolist() == [2.0, 2.0]


def test_other_threads_move_modules_while_an_estimate_runs() -> None:
    """Real modules are moved by PyTorch's own method; a second estimate waits, so that both restore what they found."""
    apply = torch.nn.Module._apply
    inside, leave = threading.Event(), threading.Event()

    def estimate() -> None:
        with fake_tensors():
            inside.set()
            assert leave.wait(60)

    threads = [threading.Thread(target=estimate) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert inside.wait(60)
    weight = torch.nn.Linear(2, 2).to(torch.float64).weight
    assert weight.dtype == torch.float64 and isinstance(weight, torch.nn.Parameter) and weight.is_leaf
    leave.set()
    for thread in threads:
        thread.join()
    assert torch.nn.Module._apply is apply


def test_a_sentence_for_a_person() -> None:
    account = MemoryAccount(2_000_000, 1_000_000, 500_000, 0, 0, 3_456_789, 7_000_000)
    assert account.as_text() == (
        "7.0 MB at the peak of an update (weights 2.0 MB, gradients 1.0 MB, optimizer 0.5 MB, activations 3.5 MB)"
    )
    assert account.to_plain()["peak_bytes"] == 7_000_000
