#!/bin/sh
# Training on this machine (Linux, macOS, WSL2), run again after failures and stops:
#   sh cluster/single_node.sh --dataset-file corpus --brain-name docs
# The options are those of `hrm-ray train`; several GPUs are found. Ctrl-C saves and ends it.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
venv=${HRM_RAY_VENV:-$root/.venv}
if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install -q -c "$root/constraints.txt" "$root"
fi
exec "$venv/bin/python" "$root/jobs/train.py" "$@"
