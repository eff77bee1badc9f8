#!/usr/bin/env bash
# Does CTC transfer better than cross-entropy, at a size that two cores can do?
#
#   TRANSFER_SUITE_DATA=/path/to/data docs/evidence/transfer.sh
#
# A ResNet-18 with CIFAR stem and width 16, random, by CE and by CTC (transferability preset, K 4096),
# pretrained on a CIFAR-100 subset of 10,000 images, 60 epochs each (CTC: 40 + 20), 3 seeds; the last
# checkpoint judged on a CIFAR-10 subset and on Flowers-17, linear † and fine-tuned ‡. What is done is
# skipped, so that it can be cut and started again. About 2 hours on two quiet cores.
# The data folder holds cifar100/*.npz, cifar10/*.npz and flowers17_128/{train,test}/CLASS/*.jpg.
# Rows are gathered in docs/evidence/transfer_rows.jsonl.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
runs=${RUNS:-$root/runs/evidence}
seeds=${SEEDS:-1 2 3}
first=${EPOCHS1:-40}  # CTC's stage 1
second=${EPOCHS2:-20} # CTC's stage 2; CE trains for both together
every=$((first + second))
common=(arch resnet18_cifar_w16 data.name npz data.root cifar100 data.workers 0
    loop.batch_size 64 loop.amp auto loop.save_every "$every")

pretrain() { # method recipe seed last-epoch overrides…
    local method=$1 recipe=$2 seed=$3 last=$4 resume=()
    local folder=$runs/pretrain/$method-s$seed
    weights=$folder/checkpoints/$(printf 'epoch_%04d.pth' "$last")
    [ -f "$folder/results.jsonl" ] && return
    [ -f "$folder/resume.pth" ] && resume=(--resume)
    "$root/tools/run_pretrain.py" "$method" --config "pretrain/$recipe" --output "$folder" \
        "${resume[@]}" seed "$seed" "${common[@]}" "${@:5}"
}

transfer() { # config name
    local folder=$runs/transfer/$1/$2 resume=()
    [ -f "$folder/results.jsonl" ] && return
    [ -d "$folder" ] && resume=(--resume)
    "$root/tools/run_transfer.py" --config "transfer/$1.yaml" --weights "$weights" \
        --output "$folder" "${resume[@]}"
}

for seed in $seeds; do
    for method in random ce ctc; do
        case $method in
            random) pretrain random ce_cifar100.yaml "$seed" 0 ;;
            ce) pretrain ce ce_cifar100.yaml "$seed" "$every" ce.stage.epochs "$every" ;;
            ctc) pretrain ctc ctc_cifar100_transferability.yaml "$seed" "$every" \
                ctc.stage1.epochs "$first" ctc.stage2.epochs "$second" ctc.num_negatives 4096 ;;
        esac
        for config in cifar10_subset_linear flowers17_linear cifar10_subset_finetune \
            flowers17_finetune; do
            transfer "$config" "$method-s$seed"
        done
    done
done
cat "$runs"/transfer/*/*/results.jsonl > "$root/docs/evidence/transfer_rows.jsonl"
"$root/tools/make_report.py" "$runs/transfer" --baseline ce --output "$runs/report"
