"""What only a CUDA device has for long texts: other attention kernels, and states in host memory."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from hrm_ray.model.attention import attend
from hrm_ray.model.attention_backends import KernelCapabilities, KernelName, choose_kernel, load_kernel
from hrm_ray.model.build import build_objective
from hrm_ray.model.chunked import Chunking
from hrm_ray.model.scope import AttentionScope
from tests.support.chunked_cases import RunResult, Shape, assert_same_forward, assert_same_gradients, trained
from tests.support.tiny_models import tiny_config, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTH = 900
SCOPES = {
    "causal": (False, None),
    "window": (False, 100),
    "documents": (True, None),
    "window and documents": (True, 100),
}


def scope_of(name: str) -> AttentionScope:
    packed, window = SCOPES[name]
    places = torch.arange(LENGTH, device="cuda")
    documents = torch.stack((places // 250, (places > 400).long())) if packed else None
    return AttentionScope(causal=True, documents=documents, window=window)


def results(kernel: str, scope: AttentionScope, queries: int, dtype: torch.dtype) -> list[Tensor]:
    """Attention and its gradients, in float32."""
    generator = torch.Generator().manual_seed(1)
    parts = [
        torch.randn(2, 2, count, 32, generator=generator).to("cuda", dtype).requires_grad_()
        for count in (queries, LENGTH, LENGTH)
    ]
    outer = torch.randn(2, 2, queries, 32, generator=generator).to("cuda", dtype)
    seen = (attend if kernel == "sdpa" else load_kernel(kernel))(*parts, scope)  # type: ignore[arg-type]
    return [each.detach().float() for each in (seen, *torch.autograd.grad(seen, parts, outer))]


def assert_near(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for one, other in zip(got, want, strict=True):
        assert float((one - other).abs().max()) <= tolerance * float(other.abs().max())


@pytest.mark.parametrize("name", SCOPES)
def test_flex_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 with TF32 off, sums in another order: 1e-3."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    got = results("flex", scope_of(name), LENGTH, torch.float32)
    assert_near(got, results("sdpa", scope_of(name), LENGTH, torch.float32), 1e-3)


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize("queries", [LENGTH, 300, 1])
def test_flash_attention(name: str, queries: int) -> None:
    """bfloat16 on both sides: 2 percent of the largest value."""
    place = KernelCapabilities.here("cuda", narrow=True)
    kernel: KernelName = choose_kernel(True, tiny_config(hidden_size=64), place)
    if not kernel.startswith("flash"):
        pytest.skip("FlashAttention is not installed, or the GPU is too old")
    got = results(kernel, scope_of(name), queries, torch.bfloat16)
    assert_near(got, results("sdpa", scope_of(name), queries, torch.bfloat16), 0.02)


def test_the_libraries_are_seen() -> None:
    assert ("triton" in KernelCapabilities.here("cuda", narrow=True).libraries) == (find_spec("triton") is not None)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_resting_in_host_memory(exact: bool, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, and less on the device between passes."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    shape = Shape(((40, 24), (64,)), tiny_config(seq_len=64, window_size=window))
    batch = {name: column.cuda() for name, column in shape.batch().items()}

    def outcome(offload: bool) -> RunResult:
        model = tiny_model(shape.config).cuda()
        chunking = Chunking(10, exact=exact, offload=offload)
        return trained(
            build_objective(model, "softmax", supervision="rollout", halt_margin=0.01, chunking=chunking).train(), batch
        )

    got, want = outcome(True), outcome(False)
    assert_same_forward(got, want)
    assert_same_gradients(got, want)
