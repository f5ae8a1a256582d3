"""The body of `hrm-ray generate`: text from a trained language model.

One job: open the bundle, encode, sample, print. Sampling itself is in model/generate.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from hrm_ray.cli.used_model import opened
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.errors import DataError, Fault, SettingsError
from hrm_ray.inference.text import Sampling, generate
from hrm_ray.rundir import RunDir


def run_generate(
    bundle: Path,
    *,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    adaptive: bool,
    device: str,
) -> int:
    """Print the prompt and what the model writes after it, as it comes; gives the exit code."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise SettingsError(Fault(f"--prompt {prompt!r}", "it is not UTF-8 text", "Give text in UTF-8")) from None
    model = opened(bundle, device)
    config = model.config
    if config.task != "lm":
        raise DataError(Fault(str(bundle), "this model solves puzzles", "Use `hrm-ray solve` with it"))
    if adaptive and (config.arch != "actv1" or config.halt_rule == "none" or config.halt_max_steps == 1):
        reason = "this model has no trained halting head for text"
        raise SettingsError(Fault("--adaptive", reason, "Leave it out, or train with --halt-rule gain"))
    tokenizer_file = RunDir(bundle).tokenizer
    if not tokenizer_file.is_file():
        raise DataError(Fault(str(tokenizer_file), "the bundle has no tokenizer", "Give a whole bundle"))
    tokenizer = TextTokenizer.load(bundle)
    ids = [int(token) for token in tokenizer.encode(prompt)] or [tokenizer.end_of_text_id]
    kept = len(ids[-config.seq_len :])
    if kept < len(ids):
        print(f"the prompt has {len(ids)} tokens; the last {kept} are read", file=sys.stderr)
    room = config.seq_len - kept + 1
    if config.lm_mask == "prefix" and max_new_tokens > room:
        print(f"the context of {config.seq_len} tokens has room for {room} after this prompt", file=sys.stderr)
    drawn = generate(
        model,
        ids,
        sampling=Sampling(temperature, top_k, top_p),
        max_new_tokens=max_new_tokens,
        end_of_text_id=tokenizer.end_of_text_id,
        seed=seed,
        adaptive=adaptive,
    )
    print(prompt, end="", flush=True)
    written: list[int] = []
    shown, segments = "", 0
    with torch.inference_mode():
        for token in drawn:
            written.append(token.token)
            segments += token.segments
            text = tokenizer.decode(written)
            # A character may be spread over tokens: hold back what is not whole yet.
            if not text.endswith("\ufffd"):
                print(text[len(shown) :], end="", flush=True)
                shown = text
    print(tokenizer.decode(written)[len(shown) :])
    if adaptive and written:
        print(f"mean segments {segments / len(written):.2f} of {config.halt_max_steps}", file=sys.stderr)
    return 0
