"""Other kernels for the same attention: FlashAttention, and FlexAttention compiled for long rows.

A kernel is chosen once, before training. All give the numbers of `attention.attend`, which computes the calls that a
kernel does not support; each class says which.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_ray.model.attention import WHOLE_MASK_ENTRIES, AttentionKernel, attend
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.scope import AttentionScope

KernelName: TypeAlias = Literal["sdpa", "flex", "flash2", "flash3"]

FLASH_MODULES: dict[KernelName, str] = {"flash3": "flash_attn_interface", "flash2": "flash_attn"}
"""Modules of FlashAttention 3 and 2, best first; 3 runs on Hopper GPUs only (Shah et al. 2024, Dao 2023)."""

FLASH_HEAD_DIM = 256
"""The widest head that FlashAttention supports."""

FLEX_HEAD_DIM = 16
"""The narrowest head that FlexAttention's kernels support."""


@dataclass(frozen=True)
class KernelCapabilities:
    """What determines the choice of a kernel: the kind of device, its CUDA capability, the installed libraries, and
    whether attention is computed in a 16-bit type."""

    device: str
    capability: tuple[int, int]
    libraries: frozenset[str]
    narrow: bool

    @classmethod
    def here(cls, device: str, *, narrow: bool) -> KernelCapabilities:
        """This machine's."""
        capability = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
        libraries = (*FLASH_MODULES.values(), "triton")
        return cls(device, capability, frozenset(name for name in libraries if find_spec(name) is not None), narrow)


def choose_kernel(asked: bool | None, config: ModelConfig, capabilities: KernelCapabilities) -> KernelName:
    """The kernel to train with. `asked` is --use-flash-attn: False never, None and True where it can be used."""
    if asked is not False and flash_obstacle(config, capabilities) is None:
        return _flash_name(capabilities)
    compiled = capabilities.device == "cuda" and "triton" in capabilities.libraries
    return "flex" if compiled and config.task == "lm" and config.head_dim >= FLEX_HEAD_DIM else "sdpa"


def flash_obstacle(config: ModelConfig, capabilities: KernelCapabilities) -> str | None:
    """Why FlashAttention cannot be used here; None where it can."""
    if capabilities.device != "cuda":
        return f"it needs a CUDA device, and this is {capabilities.device}"
    if capabilities.capability < (8, 0):
        return "it needs an Ampere GPU or newer"
    if FLASH_MODULES[_flash_name(capabilities)] not in capabilities.libraries:
        return "flash_attn is not installed"
    if not capabilities.narrow:
        return "it computes in 16-bit types only, and this run does not (--no-amp)"
    if config.head_dim > FLASH_HEAD_DIM:
        return f"a head of {config.head_dim} is wider than its {FLASH_HEAD_DIM}"
    if config.lm_mask == "prefix":
        return "it has no mask in which a prompt sees itself fully"
    return None


def _flash_name(capabilities: KernelCapabilities) -> KernelName:
    hopper = capabilities.capability[0] == 9 and FLASH_MODULES["flash3"] in capabilities.libraries
    return "flash3" if hopper else "flash2"


def load_kernel(name: KernelName) -> AttentionKernel:
    """The kernel of this name, with its library imported."""
    if name == "sdpa":
        return attend
    if name == "flex":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        return FlexAttention(torch.compile(flex_attention), torch.compile(create_block_mask))
    module = importlib.import_module(FLASH_MODULES[name]).__dict__
    return FlashAttention(module["flash_attn_func"], module["flash_attn_varlen_func"])


class FlashAttention:
    """FlashAttention: causal, windowed and full rows, and packed documents as sequences of unequal lengths.

    `whole` and `packed` are the library's flash_attn_func and flash_attn_varlen_func. Scopes with a prompt, and tensors
    that are not of a 16-bit type (a model used without mixed precision), go to `attend`.
    """

    def __init__(self, whole: Callable[..., Any], packed: Callable[..., Any]) -> None:
        self.whole = whole
        self.packed = packed

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, scope: AttentionScope) -> Tensor:
        """See AttentionKernel."""
        if scope.prompt is not None or query.dtype not in (torch.bfloat16, torch.float16):
            return attend(query, keys, values, scope)
        # The library aligns the last query with the last key, as AttentionScope does.
        behind = -1 if scope.window is None else scope.window - 1
        rule = {"causal": scope.causal, "window_size": (behind, 0 if scope.causal else behind)}
        parts = [part.transpose(1, 2) for part in (query, keys, values)]
        documents = scope.documents
        if documents is None:
            return _result(self.whole(*parts, **rule)).transpose(1, 2)
        query, keys, values = parts
        rows, queries, total = query.shape[0], query.shape[1], keys.shape[1]
        pieces = scope.cached(("pieces", queries, total), lambda: document_pieces(documents, queries, total))
        if pieces.kept is not None:
            keys, values = keys[pieces.kept], values[pieces.kept]
        seen = self.packed(
            query.flatten(0, 1),
            keys.reshape(-1, *keys.shape[-2:]),
            values.reshape(-1, *values.shape[-2:]),
            cu_seqlens_q=pieces.query_starts,
            cu_seqlens_k=pieces.key_starts,
            max_seqlen_q=pieces.most_queries,
            max_seqlen_k=pieces.most_keys,
            **rule,
        )
        return _result(seen).view(rows, queries, *query.shape[2:]).transpose(1, 2)


@dataclass(frozen=True)
class Pieces:
    """Documents of all rows, concatenated: where each begins among the queries and among the keys (int32, with the
    end), and which keys [B, T] belong to the document of some query (None: all)."""

    query_starts: Tensor
    key_starts: Tensor
    most_queries: int
    most_keys: int
    kept: Tensor | None


def document_pieces(documents: Tensor, queries: int, total: int) -> Pieces:
    """Cut the rows at the borders of their `documents` [B, T]; a document may begin before the first query."""
    documents = documents[:, -total:]
    earlier = total - queries
    own = documents[:, earlier:]
    begins = F.pad(own[:, 1:] != own[:, :-1], (1, 0), value=True)
    begin_positions = begins.flatten().nonzero().flatten()
    end = torch.tensor([own.numel()], device=begin_positions.device)
    lengths = torch.diff(torch.cat((begin_positions, end)))
    # Keys before the first query count if they are of its document; they lengthen the row's first piece.
    kept = documents == documents[:, earlier : earlier + 1]
    kept[:, earlier:] = True
    key_lengths = lengths.clone()
    first_of_row = begins.flatten().cumsum(0)[:: own.shape[1]] - 1
    key_lengths[first_of_row] += kept[:, :earlier].sum(1)
    starts = [F.pad(each.cumsum(0), (1, 0)).to(torch.int32) for each in (lengths, key_lengths)]
    most_queries, most_keys = torch.stack((lengths.max(), key_lengths.max())).tolist()
    return Pieces(starts[0], starts[1], most_queries, most_keys, kept if earlier else None)


def _result(returned: Any) -> Tensor:
    """The first releases of FlashAttention 3 return a tuple (result, normalisers)."""
    result: Tensor = returned[0] if isinstance(returned, tuple) else returned
    return result


class FlexAttention:
    """FlexAttention (Dong et al. 2024): long rows with documents, prompts or a window, whose unseen blocks are skipped.

    `attend` computes the rest: short rows; rows that a kernel's own causal or full rule covers; and fewer queries than
    keys (chunks, generation), since it would be compiled again for each number of them.
    """

    def __init__(self, attention: Callable[..., Any], block_mask: Callable[..., Any]) -> None:
        self.attention = attention
        self.block_mask = block_mask

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, scope: AttentionScope) -> Tensor:
        """See AttentionKernel."""
        length = query.shape[2]
        simple = scope.is_plain_causal(length, keys.shape[2]) or scope.sees_all(length, keys.shape[2])
        if simple or length != keys.shape[2] or length * length <= WHOLE_MASK_ENTRIES:
            return attend(query, keys, values, scope)
        rows = None if scope.is_rule() else query.shape[0]
        mask = scope.cached(
            ("flex", length),
            lambda: self.block_mask(pair_rule(scope), rows, None, length, length, device=query.device),
        )
        seen: Tensor = self.attention(query, keys, values, block_mask=mask)
        return seen


def pair_rule(scope: AttentionScope) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The scope as FlexAttention's mask_mod: whether, in a row, a query position sees a key position, elementwise."""
    causal, window, documents, prompt = scope.causal, scope.window, scope.documents, scope.prompt

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = key >= 0
        if causal:
            allowed = key <= query
            if prompt is not None:
                allowed = allowed | (prompt[row, query] & prompt[row, key])
        if window is not None:
            allowed = allowed & (key > query - window) & (key < query + window)
        if documents is not None:
            allowed = allowed & (documents[row, query] == documents[row, key])
        return allowed

    return sees
