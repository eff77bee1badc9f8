#!/usr/bin/env bash
# Pretrains a backbone on all GPUs of this machine, or on the CPU where there is none.
#
#   tools/pretrain.sh ctc                                        ResNet-50 on the embedded data
#   tools/pretrain.sh ce --config pretrain/ce_cifar100.yaml      a recipe
#   tools/pretrain.sh ctc --output runs/x --resume               go on after an interruption
#   tools/pretrain.sh ctc data.workers 8 seed 2                  KEY VALUE overrides
#
# NPROC sets the processes of this machine (default: its GPUs, or 1). Several machines: see
# tools/launch.py --help.
set -euo pipefail
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$tools/../.venv/bin/python}
if [ ! -x "$(command -v "$python")" ]; then
    make -C "$tools/.." .venv >&2
fi
exec "$python" "$tools/launch.py" --processes "${NPROC:-0}" "$tools/run_pretrain.py" "$@"
