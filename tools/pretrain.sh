#!/usr/bin/env bash
# Pretrains a backbone on all GPUs of this machine, or on the CPU where there is none.
#
#   tools/pretrain.sh ctc                                        ResNet-50 on the embedded data
#   tools/pretrain.sh ce --config pretrain/ce_cifar100.yaml      a recipe
#   tools/pretrain.sh ctc --output runs/x --resume               go on after an interruption
#   tools/pretrain.sh ctc data.workers 8 seed 2                  KEY VALUE overrides
#
# More machines: set torchrun's own options in TORCHRUN_ARGS on each of them, for example
#   TORCHRUN_ARGS="--nnodes 4 --rdzv-backend c10d --rdzv-endpoint HOST:29400 --rdzv-id 7"
# NPROC sets the processes of this machine (default: its GPUs, or 1).
set -euo pipefail
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$tools/../.venv/bin/python}
if [ ! -x "$(command -v "$python")" ]; then
    make -C "$tools/.." .venv >&2
fi
processes=${NPROC:-$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}
if [ "$processes" = 1 ] && [ -z "${TORCHRUN_ARGS:-}" ]; then
    exec "$python" "$tools/run_pretrain.py" "$@"
fi
case " $* " in
*" --dry-run "*) ;;
*) "$python" "$tools/run_pretrain.py" --dry-run "$@" >/dev/null ;; # bad input ends here, said once
esac
# shellcheck disable=SC2086  # TORCHRUN_ARGS is a list of words
exec "$python" -m torch.distributed.run --nproc-per-node "$processes" \
    ${TORCHRUN_ARGS:---standalone} "$tools/run_pretrain.py" "$@"
