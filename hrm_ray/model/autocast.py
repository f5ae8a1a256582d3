"""In which type the matrix products of a pass are taken.

One job: that question, for code which multiplies by other means than PyTorch's own autocast knows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """Autocast's type where it is on for the device of `x`, else that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
