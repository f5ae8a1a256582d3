"""Options, values of options and commands that are planned and not built yet, each with what serves today.

Building one of them means deleting its row.
"""

from __future__ import annotations

from hrm_ray.errors import Fault

_WORKERS = "Use --launcher ray --world-size N today"
_CLOUD = "Use a --bundle-dir on a disk today, and copy the bundle with the cloud's own tool"
_PROMPTS = "Use `hrm-ray generate BUNDLE --prompt TEXT` after the run today"
_FAILURES = "Use --resume today: it continues from the newest checkpoint"
_ARCHITECTURE = "Use --arch actv1 today"

NOT_BUILT: dict[str, str] = {
    "--cloud-provider": _CLOUD,
    "--cloud-bucket": _CLOUD,
    "--cloud-region": _CLOUD,
    "--cloud-prefix": _CLOUD,
    "--azure-account-name": _CLOUD,
    "--azure-sas-token": _CLOUD,
    "--storage": "Use a --bundle-dir that all machines share today",
    "--inference-device": _PROMPTS,
    "--hot-reload-steps": _PROMPTS,
    "--serve-port": _PROMPTS,
    "--rejoin-every": _FAILURES,
    "--expert-parallel": "Use --strategy ddp today: every worker has all experts",
    "--context-parallel": "Use --use-chunked-training for long sequences today",
    "--device dml": "Use --device cpu today",
    "--arch trm": _ARCHITECTURE,
    "--arch hrm-text": _ARCHITECTURE,
    "--puzzle-emb-len": _ARCHITECTURE,
    "--mlp-t": _ARCHITECTURE,
    "--bp-min-steps": "Use --bp-steps today",
    "--bp-max-steps": "Use --bp-steps today",
    "--bp-warmup-ratio": "Use --bp-steps today",
    "hrm-ray export": "Use the bundle's model.safetensors and config.json today",
    "hrm-ray serve": _PROMPTS,
    "hrm-ray tune": "Use `hrm-ray train` once for each set of options today, and `hrm-ray plot` to compare",
    "hrm-ray matrix": "Use `hrm-ray train --dry-run` with the options today: it refuses what cannot work",
    "hrm-ray panel": "Use `hrm-ray train`, and TensorBoard on the bundle today",
}
"""An option, `--option value`, or `hrm-ray command` -> the hint of its message."""

SWITCHES = frozenset({"--expert-parallel", "--context-parallel", "--mlp-t"})
"""Those of the options that take no value."""


def not_built(name: str) -> Fault | None:
    """The fault of a name in the table, without any value: it may be a secret."""
    return Fault(name, "is not built yet", NOT_BUILT[name]) if name in NOT_BUILT else None
