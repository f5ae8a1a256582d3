"""Text generation with a trained language model: incremental decoding with key/value caches, and sampling.

A segment's pass meets h_cycles * (l_cycles * l_layers + h_layers) attentions; each keeps its own keys and values per
segment, so that a new token attends to exactly what whole-row evaluation would show it (ACTV1_SPEC, section 13). With
adaptive decoding a halted token leaves copies of its last keys and values in the caches of all later segments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hrm_ray.bundle.store import open_bundle
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.errors import DataError, Fault, SettingsError
from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.layers import Attention, Block, Context, KeysValues, Site, call
from hrm_ray.model.scope import AttentionScope, text_scope
from hrm_ray.model.transformer import Transformer


@dataclass(frozen=True)
class Sampling:
    """How a token is sampled. Temperature 0 is greedy; top_k 0 and top_p 1 disable those limits.

    Raises SettingsError for values out of range.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        greedy = "For greedy decoding give --temperature 0"
        if not 0 <= self.temperature < math.inf:
            raise SettingsError(Fault(f"--temperature {self.temperature:g}", "must be a number of 0 or more", greedy))
        if self.top_k < 0:
            raise SettingsError(Fault(f"--top-k {self.top_k}", "must be 0 or more", "For no limit leave it out"))
        if not 0 < self.top_p <= 1:
            raise SettingsError(Fault(f"--top-p {self.top_p:g}", "must be above 0, and 1 or less", greedy))


@dataclass(frozen=True)
class SampledToken:
    """A sampled token, and the number of segments that the position before it ran."""

    token: int
    segments: int


class AttentionCache:
    """One attention's keys and values in one segment, [1, heads, T, d] each, in tensors that grow geometrically.

    A new token is copied once, and older ones only when the tensors grow: the cost of a text is linear in its length.
    With a `window` what no new token can see is dropped.
    """

    def __init__(self, window: int | None) -> None:
        self._window = window
        self._tensors: list[Tensor] = []
        # The cached positions within the tensors.
        self._start = self._stop = 0

    def append(self, keys: Tensor, values: Tensor) -> KeysValues:
        """Add new tokens; returns all keys and values that they may see."""
        new = keys.shape[2]
        if self._window is not None:
            self._start = max(self._start, self._stop - self._window + 1)
        kept = self._stop - self._start
        if not self._tensors or self._stop + new > self._tensors[0].shape[2]:
            old = [tensor[:, :, self._start : self._stop] for tensor in self._tensors]
            shape = (*keys.shape[:2], 2 * (kept + new), keys.shape[3])
            self._tensors = [keys.new_empty(shape), values.new_empty(shape)]
            for tensor, before in zip(self._tensors, old, strict=False):
                tensor[:, :, :kept] = before
            self._start, self._stop = 0, kept
        for tensor, own in zip(self._tensors, (keys, values), strict=True):
            tensor[:, :, self._stop : self._stop + new] = own
        self._stop += new
        return self.last(kept + new)

    def last(self, count: int) -> KeysValues:
        """Keys and values of the last `count` positions, as views."""
        keys, values = (tensor[:, :, self._stop - count : self._stop] for tensor in self._tensors)
        return keys, values

    def __len__(self) -> int:
        return self._stop - self._start


class SegmentCaches:
    """Caches of every attention of every segment."""

    def __init__(self, window: int | None = None) -> None:
        self._window = window
        self.caches: dict[tuple[int, Site], AttentionCache] = {}
        self._segment = 0
        self._frozen = torch.zeros(0, dtype=torch.bool)

    def begin_segment(self, segment: int, frozen: Tensor) -> None:
        """The next pass is that of `segment` (from 0) over new tokens; those `frozen` [new] halted before it."""
        self._segment, self._frozen = segment, frozen

    def update(self, site: Site, keys: Tensor, values: Tensor) -> KeysValues:
        """See KVCache. A frozen token keeps the keys and values that it had in the segment before."""
        if self._segment > 0:
            old_keys, old_values = self.caches[self._segment - 1, site].last(keys.shape[2])
            frozen = self._frozen.view(1, 1, -1, 1)
            keys, values = torch.where(frozen, old_keys, keys), torch.where(frozen, old_values, values)
        return self._append(site, keys, values)

    def skip_segment(self, segment: int) -> None:
        """All new tokens have halted: `segment` gets copies of the segment before, and no pass is needed."""
        self._segment = segment
        for site in [site for at, site in self.caches if at == segment - 1]:
            self._append(site, *self.caches[segment - 1, site].last(len(self._frozen)))

    def _append(self, site: Site, keys: Tensor, values: Tensor) -> KeysValues:
        return self.caches.setdefault((self._segment, site), AttentionCache(self._window)).append(keys, values)


class DecodingSession:
    """Reads tokens into a model's caches and returns the logits of the next one."""

    def __init__(self, model: ActV1 | Transformer, adaptive: bool) -> None:
        self.model = model
        self.adaptive = adaptive
        self.restart()

    def restart(self) -> None:
        """Forget everything read."""
        self.caches = SegmentCaches(self.model.config.window_size)
        self.length = 0

    @torch.no_grad()
    def read(self, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Logits [n, V] after each of `tokens`, and the number of segments that each ran [n].

        The first call reads a prompt (fully visible to itself under a prefix mask); later ones take one token each.
        """
        model, config = self.model, self.model.config
        device = model.lm_head.weight.device
        start, new = self.length, len(tokens)
        if start > 0 and new != 1:
            raise ValueError(f"{new} tokens at once; after the prompt, tokens are read one at a time")
        ids = torch.tensor([tokens], device=device)
        positions = torch.arange(start, start + new, device=device).unsqueeze(0)
        x = model.embedding(ids, None, positions if config.pos_encodings == "learned" else None)
        context = Context(self._scope(start, new, device), model.rotation(start, start + new), self.caches.update)
        self.length += new
        frozen = torch.zeros(new, dtype=torch.bool, device=device)
        if isinstance(model, Transformer):
            self.caches.begin_segment(0, frozen)
            hidden = model(x, context)
            return model.logits(hidden)[0], torch.ones(new, dtype=torch.long, device=device)
        states = model.initial_states(1, new)
        output = torch.zeros_like(states.z_h[0])
        segments = torch.zeros(new, dtype=torch.long, device=device)
        # The halting head was not trained on a prompt under a prefix mask, so such a prompt runs all segments.
        may_halt = self.adaptive and not (start == 0 and config.lm_mask == "prefix")
        for segment in range(config.halt_max_steps):
            if may_halt and bool(frozen.all()):
                self.caches.skip_segment(segment)
                continue
            self.caches.begin_segment(segment, frozen)
            states = model.segment(states, x, context)
            halts = may_halt & (model.halting_scores(states.z_h)[0][0] > 0)
            if segment == config.halt_max_steps - 1:
                halts = torch.ones_like(frozen)
            reads = halts & ~frozen
            output = torch.where(reads.unsqueeze(-1), states.z_h[0], output)
            segments = torch.where(reads, segment + 1, segments)
            frozen = frozen | halts
        return model.logits(output.unsqueeze(0))[0], segments

    def _scope(self, start: int, new: int, device: torch.device) -> AttentionScope:
        prompt = None
        if start == 0 and self.model.config.lm_mask == "prefix":
            prompt = torch.ones(1, new, dtype=torch.bool, device=device)
        return text_scope(None, prompt, self.model.config.window_size)


def generate(
    model: ActV1 | Transformer,
    prompt: list[int],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    end_of_text_id: int,
    seed: int,
    adaptive: bool,
) -> Iterator[SampledToken]:
    """Sample tokens after `prompt` (at least one) until end-of-text or `max_new_tokens`; the same seed, the same text.

    When the context is full, the older half is dropped and the rest is read again. Under a prefix mask the text ends
    there: the model was not trained to read an answer as part of a prompt.
    """
    session = DecodingSession(model, adaptive)
    generator = torch.Generator().manual_seed(seed)
    limit = model.config.seq_len
    context = prompt[-limit:]
    logits, segments = session.read(context)
    for _ in range(max_new_tokens):
        token = draw(logits[-1], sampling, generator)
        if token == end_of_text_id:
            return
        yield SampledToken(token, int(segments[-1]))
        context.append(token)
        if len(context) > limit and model.config.lm_mask == "prefix":
            return
        if len(context) > limit:
            context = context[-(limit // 2) :]
            session.restart()
            logits, segments = session.read(context)
        else:
            logits, segments = session.read([token])


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Sample one token from `logits` [V]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    # Relative to the largest and in float64, so that no temperature overflows.
    scores = logits.cpu().double()
    scores = (scores - scores.max()) / sampling.temperature
    if sampling.top_k:
        kept = scores.topk(min(sampling.top_k, scores.shape[0]))
        scores = torch.full_like(scores, -torch.inf).index_copy(0, kept.indices, kept.values)
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        # A token is kept if the probability of those before it is below top_p.
        cut = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities = probabilities.index_fill(0, order[cut], 0.0)
    return int(torch.multinomial(probabilities, 1, generator=generator))


class TextModel:
    """A trained language model and its tokenizer."""

    def __init__(self, model: ActV1 | Transformer, tokenizer: TextTokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def open(cls, bundle: Path, device: torch.device) -> TextModel:
        """Read a bundle. Raises DataError where it is damaged or its model solves puzzles."""
        model = open_bundle(bundle, device).model
        if model.config.task != "lm":
            raise DataError(Fault(str(bundle), "this is a puzzle model", "Use `hrm-ray solve` with it"))
        return cls(model, TextTokenizer.of_bundle(bundle))

    def complete(
        self, prompt: str, *, sampling: Sampling, max_new_tokens: int, seed: int, adaptive: bool = False
    ) -> Completion:
        """Continue `prompt`. Raises SettingsError for a prompt or an option that the model cannot take."""
        config = self.model.config
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise SettingsError(Fault(f"prompt {prompt!r}", "it is not UTF-8 text", "Give text in UTF-8")) from None
        if adaptive and (config.arch != "actv1" or config.halt_rule == "none" or config.halt_max_steps == 1):
            reason = "this model has no trained halting head for text"
            raise SettingsError(Fault("--adaptive", reason, "Leave it out, or train with --halt-rule gain"))
        ids = [int(token) for token in self.tokenizer.encode(prompt)] or [self.tokenizer.end_of_text_id]
        read, notes = min(len(ids), config.seq_len), []
        if read < len(ids):
            notes.append(f"the prompt has {len(ids)} tokens; only the last {read} are used")
        room = config.seq_len - read + 1
        if config.lm_mask == "prefix" and max_new_tokens > room:
            notes.append(f"the context of {config.seq_len} tokens has room for {room} after this prompt")
        tokens = generate(
            self.model,
            ids,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            end_of_text_id=self.tokenizer.end_of_text_id,
            seed=seed,
            adaptive=adaptive,
        )
        return Completion(self.tokenizer, tokens, notes)


class Completion:
    """A text that is being generated: iterating gives it piece by piece. `notes` say which parts of the request cannot
    be met; `segments` holds the number of segments behind each token so far."""

    def __init__(self, tokenizer: TextTokenizer, tokens: Iterator[SampledToken], notes: list[str]) -> None:
        self.notes = notes
        self.segments: list[int] = []
        self._tokenizer = tokenizer
        self._tokens = tokens

    def __iter__(self) -> Iterator[str]:
        # Tokens since the last piece, decoded behind those of that piece, whose end may decide about a space.
        previous: list[int] = []
        pending: list[int] = []
        for sampled in self._tokens:
            self.segments.append(sampled.segments)
            pending.append(sampled.token)
            text = self._text_of(previous, pending)
            # A character may take several tokens: wait until it is complete.
            if text and not text.endswith("\ufffd"):
                yield text
                previous, pending = pending, []
        yield self._text_of(previous, pending)

    def _text_of(self, previous: list[int], pending: list[int]) -> str:
        decode = self._tokenizer.decode
        return decode(previous + pending)[len(decode(previous)) :]


def sample_text(
    model: ActV1 | Transformer,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    seed: int = 0,
) -> str:
    """The continuation of `prompt` by a model that is being trained, with its present weights.

    The model's mode and PyTorch's random numbers are as before afterwards, so training is the same to the bit with
    and without it. Call it where the whole weights are (inside `strategy.evaluating()`), and under mixed precision
    inside `precision.computing(device)`. Raises SettingsError for a prompt that is not UTF-8.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _uncompiled(model):
            text = TextModel(model, tokenizer)
            return "".join(text.complete(prompt, sampling=sampling, max_new_tokens=max_new_tokens, seed=seed))
    finally:
        model.train(training)


@contextmanager
def _uncompiled(model: ActV1 | Transformer) -> Iterator[None]:
    """The blocks of `model` run eagerly inside: they would be compiled once for each length of the text."""
    blocks = [module for module in model.modules() if isinstance(module, Block | Attention)]
    calls = [block.call for block in blocks]
    try:
        for block in blocks:
            block.call = call
        yield
    finally:
        for block, before in zip(blocks, calls, strict=True):
            block.call = before
