# Training on this machine (Windows), run again after failures:
#   powershell -ExecutionPolicy Bypass -File cluster\single_node.ps1 --dataset-file corpus --brain-name docs
# The options are those of `hrm-ray train`. For several GPUs add --parallel-independent --world-size N: trainers in
# processes of their own, since NCCL and multi-node Ray do not run on Windows. Ctrl-C saves and ends it.
$ErrorActionPreference = "Stop"
$root = Split-Path -Parent $PSScriptRoot
$venv = if ($env:HRM_RAY_VENV) { $env:HRM_RAY_VENV } else { Join-Path $root ".venv" }
$python = Join-Path $venv "Scripts\python.exe"
if (-not (Test-Path $python)) {
    py -3 -m venv $venv
    & $python -m pip install -q -c (Join-Path $root "constraints.txt") $root
    if ($LASTEXITCODE -ne 0) { exit $LASTEXITCODE }
}
# gloo by the loopback address: the name of a Windows machine often leads to an interface that answers nobody.
$env:USE_LIBUV = "0"
& $python (Join-Path $root "jobs\train.py") @args
exit $LASTEXITCODE
