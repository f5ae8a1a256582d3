"""A context in which modules are built and run on tensors without storage."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

_module_patch_lock = threading.Lock()


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Make every tensor that this thread creates inside the context a fake one; random generators stay as they were."""
    with torch.random.fork_rng(devices=()), FakeTensorMode(), _HostNumbers(), _movable_fake_modules():
        yield


class _HostNumbers(TorchDispatchMode):
    """Answers for a fake tensor whose value is asked for: a float is 1 (a gradient norm), an integer 0 (the start of a
    document)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0 if args[0].dtype in (torch.int32, torch.int64) else 1.0
        return func(*args, **(kwargs or {}))


@contextmanager
def _movable_fake_modules() -> Iterator[None]:
    """Let `nn.Module.to` work on modules of fake tensors, whose parameters PyTorch's own way cannot swap."""
    # `_apply` belongs to the whole process: the lock keeps a second thread from restoring the first one's replacement,
    # and modules of real tensors, which another thread may move meanwhile, go through the real method.
    with _module_patch_lock:
        real = nn.Module._apply

        def apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
            if not any(isinstance(parameter, FakeTensor) for parameter in module.parameters()):
                return real(module, change, recurse)
            for child in module.children() if recurse else ():
                child._apply(change)
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameter.data = change(parameter.data)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else change(buffer)
            return module

        nn.Module._apply = apply  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module._apply = real  # type: ignore[method-assign]
