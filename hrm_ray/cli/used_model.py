"""Opening a bundle for a command that uses a model.

One job: device and bundle together, with the device's fallback said on stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from hrm_ray.bundle.store import open_bundle
from hrm_ray.launch.devices import choose_device
from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.transformer import Transformer


def opened(bundle: Path, device: str) -> ActV1 | Transformer:
    """The bundle's model on the wanted device, in evaluation mode."""
    kind, notes = choose_device(device)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    return open_bundle(bundle, torch.device(kind)).model
