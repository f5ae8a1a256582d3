"""The rehearsal of a weight update tells what a real one takes."""

from __future__ import annotations

Options = dict[str, str | bool]

TEXT: Options = {"--task": "lm", "--no-moe": True, "--no-amp": True, "--hidden-size": "256", "--num-heads": "4"}
TEXT |= {"--num-layers": "4", "--h-cycles": "1", "--max-seq-len": "256", "--batch-size": "16"}
PUZZLE: Options = {**TEXT, "--task": "puzzle", "--max-seq-len": "81", "--batch-size": "64"}


def case(base: Options, vocab_size: int = 2000, **changes: str | bool) -> tuple[Options, int]:
    """The base's options with some changed; a switch takes the place of its contrary."""
    said = {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    contrary = {f"--no-{name[2:]}" for name in said} | {f"--{name[5:]}" for name in said if name.startswith("--no-")}
    return {name: value for name, value in base.items() if name not in contrary} | said, vocab_size


CASES: dict[str, tuple[Options, int]] = {
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
    "text, adapters on int8": case(TEXT, hidden_size="1024", use_peft=True, load_in_8bit=True, batch_size="4"),
    "transformer": case(TEXT, arch="transformer", no_gradient_checkpointing=True),
    "puzzle": case(PUZZLE, 12),
    "puzzle, no checkpointing": case(PUZZLE, 12, no_gradient_checkpointing=True),
    "puzzle, carried, accumulated": case(PUZZLE, 12, gradient_accumulation_steps="6"),
    "puzzle, rollout, embedding": case(PUZZLE, 12, supervision="rollout", puzzle_emb_ndim="256", batch_size="96"),
}
