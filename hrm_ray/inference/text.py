"""Writing text token by token, with one key/value cache per segment and attention.

One job: sampling from a language model (ACTV1_SPEC, section 13). A segment's pass over the network meets
h_cycles * (l_cycles * l_layers + h_layers) attentions; each keeps its own keys and values per segment, so that a new
token sees exactly what whole-sequence evaluation would show it. With adaptive reading a halted token leaves copies of
its last keys and values in the caches of all later segments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.attention import AttentionScope
from hrm_ray.model.layers import Context, Site
from hrm_ray.model.scope import text_scope
from hrm_ray.model.transformer import Transformer


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: temperature 0 takes the likeliest; top_k 0 and top_p 1 cut nothing."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class SampledToken:
    """A drawn token and how many segments its predecessor's position was thought about."""

    token: int
    segments: int


class SegmentCaches:
    """Keys and values of every attention of every segment, [1, heads, T, d] each.

    With a `window` what no new token can see any more is dropped.
    """

    def __init__(self, window: int | None = None) -> None:
        self._window = window
        self._kept: dict[tuple[int, Site], tuple[Tensor, Tensor]] = {}
        self._segment = 0
        self._frozen = torch.zeros(0, dtype=torch.bool)

    def begin_segment(self, segment: int, frozen: Tensor) -> None:
        """The pass to come is that of `segment` (from 0) over new tokens; those `frozen` [new] had halted before it."""
        self._segment, self._frozen = segment, frozen

    def update(self, site: Site, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take the new tokens' keys and values, a frozen token's replaced by its last ones; all there are come back."""
        if self._segment > 0:
            old_keys, old_values = self._newest(self._segment - 1, site)
            frozen = self._frozen.view(1, 1, -1, 1)
            keys, values = torch.where(frozen, old_keys, keys), torch.where(frozen, old_values, values)
        return self._append(site, keys, values)

    def skip_segment(self, segment: int) -> None:
        """All new tokens have halted: `segment` gets copies of the segment before, and no pass is needed."""
        sites = [site for at, site in self._kept if at == segment - 1]
        self._segment = segment
        for site in sites:
            self._append(site, *self._newest(segment - 1, site))

    def _newest(self, segment: int, site: Site) -> tuple[Tensor, Tensor]:
        new = self._frozen.shape[0]
        keys, values = self._kept[(segment, site)]
        return keys[:, :, -new:], values[:, :, -new:]

    def _append(self, site: Site, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        place = (self._segment, site)
        if place in self._kept:
            old_keys, old_values = map(self._in_reach, self._kept[place])
            keys, values = torch.cat((old_keys, keys), dim=2), torch.cat((old_values, values), dim=2)
        self._kept[place] = (keys, values)
        return keys, values

    def _in_reach(self, old: Tensor) -> Tensor:
        """What the next token can see of what is kept."""
        return old if self._window is None else old[:, :, max(old.shape[2] - self._window + 1, 0) :]


class DecodingSession:
    """Feeds tokens to a model and gives the scores of the next one, keeping caches in between."""

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
        """Logits [n, V] after each of `tokens`, and how many segments each was thought about [n].

        The first call reads a prompt (fully visible to itself under a prefix mask); later ones take one token each.
        """
        model, config = self.model, self.model.config
        device = model.lm_head.weight.device
        start, new = self.length, len(tokens)
        assert start == 0 or new == 1, "after the prompt tokens come one at a time"
        ids = torch.tensor([tokens], device=device)
        places = torch.arange(start, start + new, device=device).unsqueeze(0)
        x = model.embedding(ids, None, places if config.pos_encodings == "learned" else None)
        context = Context(self._scope(start, new, device), model.rotation(start, start + new), self.caches.update)
        self.length += new
        if isinstance(model, Transformer):
            self.caches.begin_segment(0, torch.zeros(new, dtype=torch.bool, device=device))
            hidden = model(x, context)
            return model.logits(hidden)[0], torch.ones(new, dtype=torch.long, device=device)
        states = model.initial_states(1, new)
        frozen = torch.zeros(new, dtype=torch.bool, device=device)
        answer = torch.zeros_like(states.z_h[0])
        thought = torch.zeros(new, dtype=torch.long, device=device)
        # A prompt under a prefix mask was never judged in training, so it thinks to the end (see adaptive.py).
        may_halt = self.adaptive and not (start == 0 and config.lm_mask == "prefix")
        for segment in range(config.halt_max_steps):
            if bool(frozen.all()):
                self.caches.skip_segment(segment)
                continue
            self.caches.begin_segment(segment, frozen)
            states = model.segment(states, x, context)
            halts = may_halt & (model.halting_scores(states.z_h)[0][0] > 0)
            if segment == config.halt_max_steps - 1:
                halts = torch.ones_like(frozen)
            reads = halts & ~frozen
            answer = torch.where(reads.unsqueeze(-1), states.z_h[0], answer)
            thought = torch.where(reads, segment + 1, thought)
            frozen = frozen | halts
        return model.logits(answer.unsqueeze(0))[0], thought

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
    """Draw tokens after `prompt` (at least one) until end-of-text or `max_new_tokens`; the same seed, the same text.

    When the context is full, the older half is forgotten and the rest read again; under a prefix mask the text ends
    there, because an answer read again as part of a prompt is nothing the model was trained on.
    """
    reader = DecodingSession(model, adaptive)
    generator = torch.Generator().manual_seed(seed)
    limit = model.config.seq_len
    context = prompt[-limit:]
    logits, segments = reader.read(context)
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
            reader.restart()
            logits, segments = reader.read(context)
        else:
            logits, segments = reader.read([token])


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token from scores [V]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    # From the likeliest down and in double, so that no temperature overflows.
    scores = logits.cpu().double()
    scores = (scores - scores.max()) / sampling.temperature
    if sampling.top_k:
        kept = scores.topk(min(sampling.top_k, scores.shape[0]))
        scores = torch.full_like(scores, -torch.inf).index_copy(0, kept.indices, kept.values)
    chances = scores.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = chances.sort(descending=True)
        # A token stays while the mass before it is below top_p; the likeliest stays even at 0.
        cut = ordered.cumsum(-1) - ordered >= sampling.top_p
        cut[0] = False
        chances = chances.index_fill(0, order[cut], 0.0)
    return int(torch.multinomial(chances, 1, generator=generator))
