#!/bin/sh
# The timeline of docs/timeline, from pretraining to figures, on two CPU cores. It goes on where it
# was stopped. Data: $TRANSFER_SUITE_DATA with cifar100/, cifar10/ (one .npz each) and flowers17_128/.
# usage: docs/timeline/run.sh [RUNS_FOLDER] [SEEDS]
set -eu
cd "$(dirname "$0")/../.."
runs=${1:-runs/timeline}
seeds=${2:-1 2}
small="arch resnet18_cifar_w16 data.name npz data.root cifar100 data.workers 0 loop.amp auto
       loop.save_every 4"
go_on() { [ -e "$1/resume.pth" ] && echo --resume || true; }

for seed in $seeds; do
    ce="$runs/ce-s$seed" ctc="$runs/ctc-s$seed"
    tools/run_pretrain.py ce --config pretrain/ce_cifar100.yaml --output "$ce" $(go_on "$ce") \
        $small ce.stage.epochs 60 seed "$seed"
    tools/run_pretrain.py ctc --config pretrain/ctc_cifar100.yaml --output "$ctc" $(go_on "$ctc") \
        $small ctc.stage1.epochs 40 ctc.stage2.epochs 20 ctc.num_negatives 4096 seed "$seed"
    tools/run_analysis.py --run "$ce" --run "$ctc" --config analysis/timeline_subset.yaml
done
cat "$runs"/*/results.jsonl | grep '"step": "analysis"' >docs/timeline/rows.jsonl
tools/run_analysis.py --rows docs/timeline/rows.jsonl --figures docs/timeline
