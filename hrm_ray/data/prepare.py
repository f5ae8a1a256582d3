"""What the launcher does once, before workers start, and what each worker opens.

One job: from sources to a plan of JSON values (prepare_text, prepare_puzzles), and from that plan to samples
(open_samples). Workers never tokenise. The caller logs the notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

from hrm_ray.data.folders import whole_folder
from hrm_ray.data.packing import TextSamples
from hrm_ray.data.parts import TextSource
from hrm_ray.data.places import absolute
from hrm_ray.data.puzzles.format import PuzzleFacts
from hrm_ray.data.puzzles.samples import PuzzleSamples, open_puzzles
from hrm_ray.data.readers import read_documents
from hrm_ray.data.text_store import StoreMeta, write_text_store
from hrm_ray.data.tokenizer import TOKENIZER_FILE, TextTokenizer
from hrm_ray.values import SampleSet

_SPLITS = frozenset({"train", "eval"})

_TRIED_DOCUMENTS, _TRIED_CHARACTERS = 5, 2000

TokenizerOrigin: TypeAlias = Literal["loaded", "reused", "trained"]

DataPlan: TypeAlias = dict[str, "str | bool | int | None"]
"""What a worker needs to open the samples: JSON values only."""


@dataclass(frozen=True)
class RowForm:
    """How tokens become rows: `seq_len` tokens each, packed or padded; `prefix` takes pairs of prompt and response."""

    seq_len: int
    packing: bool
    prefix: bool


@dataclass(frozen=True)
class TokenizerChoice:
    """Which tokenizer: the one at `path`; else the one in the bundle unless `retrain`; else a byte-level BPE of
    `vocab_size` trained on the first `examples` documents."""

    path: Path | None
    vocab_size: int
    examples: int
    retrain: bool


@dataclass(frozen=True)
class PreparedSplit:
    """One token store: its folder, its facts, how many rows it gives, and how many pairs had to be cut to fit a row."""

    folder: Path
    meta: StoreMeta
    rows: int
    cut_pairs: int


@dataclass(frozen=True)
class PreparedText:
    """What prepare_text made. `notes` are sentences that a person should see (to be logged at WARNING)."""

    tokenizer: TextTokenizer
    tokenizer_origin: TokenizerOrigin
    train: PreparedSplit
    evaluation: PreparedSplit | None
    notes: tuple[str, ...]
    plan: DataPlan


@dataclass(frozen=True)
class PreparedPuzzles:
    """What prepare_puzzles checked: facts of both splits, and the plan."""

    train: PuzzleFacts
    evaluation: PuzzleFacts | None
    plan: DataPlan


def prepare_text(
    train: TextSource,
    evaluation: TextSource | None,
    *,
    bundle: Path,
    stores: Path,
    choice: TokenizerChoice,
    form: RowForm,
) -> PreparedText:
    """Chooses the tokenizer, saves it in `bundle`, and writes the token stores `stores`/train and `stores`/eval; the
    folder `stores` is replaced whole, or left as it was.

    Raises SettingsError for paths, columns or a row length that cannot be used, DataFault for data that cannot be read.
    """
    notes: list[str] = []
    tokenizer, origin = _choose(train, bundle, choice, notes)
    with whole_folder(stores, overwrite=True, owned=_SPLITS, option="--bundle-dir") as building:
        prepared = _prepare_split(train, tokenizer, building / "train", form, False, notes)
        held_out = None
        if evaluation is not None:
            held_out = _prepare_split(evaluation, tokenizer, building / "eval", form, True, notes)
    # Last, so that data that cannot be used leaves the bundle's tokenizer as it was.
    if origin != "reused":
        tokenizer.save(bundle)
    notes.extend(_losses(train, tokenizer))
    prepared = replace(prepared, folder=stores / "train")
    held_out = held_out and replace(held_out, folder=stores / "eval")
    plan: DataPlan = {
        "task": "lm",
        "seq_len": form.seq_len,
        "packing": form.packing,
        "prefix": form.prefix,
        "evaluation": evaluation is not None,
    }
    return PreparedText(tokenizer, origin, prepared, held_out, tuple(notes), plan)


def _choose(
    train: TextSource, bundle: Path, choice: TokenizerChoice, notes: list[str]
) -> tuple[TextTokenizer, TokenizerOrigin]:
    if choice.path is not None:
        return TextTokenizer.load(choice.path), "loaded"
    asked = f"vocab_size {choice.vocab_size} was asked for"
    if (bundle / TOKENIZER_FILE).is_file() and not choice.retrain:
        tokenizer = TextTokenizer.load(bundle)
        if tokenizer.vocab_size != choice.vocab_size:
            notes.append(
                f"The bundle's {TOKENIZER_FILE} is used again: it has {tokenizer.vocab_size} tokens, {asked}. "
                "With --retrain-tokenizer a new one is trained."
            )
        return tokenizer, "reused"
    texts = (document.text for document in read_documents(train))
    tokenizer = TextTokenizer.train(texts, choice.vocab_size, choice.examples)
    if tokenizer.vocab_size != choice.vocab_size:
        notes.append(f"The data gives a vocabulary of {tokenizer.vocab_size} tokens, {asked}.")
    return tokenizer, "trained"


def _losses(source: TextSource, tokenizer: TextTokenizer) -> list[str]:
    """A note where the first documents do not come back from the tokenizer as they were."""
    for document in islice(read_documents(source), _TRIED_DOCUMENTS):
        text = document.text[:_TRIED_CHARACTERS]
        if tokenizer.decode(tokenizer.encode(text), keep_marks=True) != text:
            return [
                "The tokenizer does not give the text back as it was (letters, spaces or lines are lost), so bits per "
                "byte come out too low to compare with another tokenizer's."
            ]
    return []


def _prepare_split(
    source: TextSource, tokenizer: TextTokenizer, folder: Path, form: RowForm, allow_short: bool, notes: list[str]
) -> PreparedSplit:
    meta = write_text_store(read_documents(source), tokenizer, folder, pairs=form.prefix)
    samples = TextSamples(folder, form.seq_len, form.packing, form.prefix, allow_short=allow_short)
    if meta.empty_documents:
        notes.append(f"{source.path}: {meta.empty_documents} documents have no token and are left out.")
    if samples.cut_pairs:
        rows = f"longer than a row of {form.seq_len} tokens and were cut"
        notes.append(f"{source.path}: {samples.cut_pairs} of {meta.documents} pairs are {rows}.")
    return PreparedSplit(folder, meta, len(samples), samples.cut_pairs)


def prepare_puzzles(train: TextSource, evaluation: TextSource | None) -> PreparedPuzzles:
    """Reads and checks both puzzle sets. Raises SettingsError for a path, DataFault for data that cannot be used."""
    plan: DataPlan = {
        "task": "puzzle",
        "path": absolute(train.path),
        "split": train.split,
        "eval_path": None if evaluation is None else absolute(evaluation.path),
        "eval_split": None if evaluation is None else evaluation.split,
    }
    samples, held_out = _open_puzzles(plan)
    return PreparedPuzzles(samples.facts, held_out.facts if held_out is not None else None, plan)


def open_samples(plan: Mapping[str, Any], stores: Path) -> tuple[SampleSet, SampleSet | None]:
    """The training and the held-out samples of a plan; `stores` is the folder that prepare_text wrote (for puzzles
    unused).

    Raises DataFault where the data has gone or is damaged since it was prepared.
    """
    if plan["task"] == "puzzle":
        return _open_puzzles(plan)
    seq_len, packing, prefix = int(plan["seq_len"]), bool(plan["packing"]), bool(plan["prefix"])
    held_out = None
    if plan["evaluation"]:
        held_out = TextSamples(stores / "eval", seq_len, packing, prefix, allow_short=True)
    return TextSamples(stores / "train", seq_len, packing, prefix), held_out


def _open_puzzles(plan: Mapping[str, Any]) -> tuple[PuzzleSamples, PuzzleSamples | None]:
    samples = open_puzzles(Path(plan["path"]), plan["split"])
    if plan["eval_path"] is None:
        return samples, None
    held_out = open_puzzles(Path(plan["eval_path"]), plan["eval_split"])
    held_out.fit_to(samples.facts)
    return samples, held_out
