#!/usr/bin/env bash
# The shipped CIFAR-10 model: train (patch 2), teach it patch 4, measure, pack for shipping.
#
#   gpu/cifar10.sh [--smoke] [train|weak|measure|pack|all]
#
# Every stage resumes where it stopped, so it may be cut off (a lent machine allows 10 minutes a command) and called
# again. DATA: folder with cifar10-{train,test}.parquet. OUT: where results go (model.tar.* in pieces of 15 MB).
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-../shared/data}
OUT=${OUT:-runs/out}
PYTHON=${PYTHON:-$(command -v .venv/bin/python || command -v python3)}
export PYTHONPATH="src:${PYTHONPATH:-}" PYTHONUNBUFFERED=1
train_steps=26000 weak_steps=4000 num=10000 repeats=3 size=() name=cifar10
if [[ ${1:-} == --smoke ]]; then
    shift
    train_steps=2 weak_steps=2 num=40 repeats=2 name=smoke
    size=(model.dit.depth=1 model.dit.width=64 model.dit.heads=2 batch_size=8 data.limit=64)
fi
stage=${1:-all}
run=runs/$name
mkdir -p "$OUT"

train() {
    # 26k steps of batch 256 are 133 epochs; about 18 minutes of an H200 at 25 steps/s (estimate).
    "$PYTHON" -m pliant.cli train configs/cifar10-flow.yaml --resume "steps=$train_steps" \
        "data.source=$DATA/cifar10-train.parquet" "output=$run-flow" "${size[@]}"
}

weak() {
    local options=()
    ((${#size[@]})) && options=(batch_size=8 data.limit=64)
    for init in noise-aligned average; do # both, so that the default can be chosen by measurement
        "$PYTHON" -m pliant.cli train configs/cifar10-weak.yaml --resume "steps=$weak_steps" \
            "model.from=$run-flow/model" "model.flexify.options.initialisation=$init" \
            "data.source=$DATA/cifar10-train.parquet" "output=$run-weak-$init" "${options[@]}"
    done
}

measure() {
    local device
    device=$("$PYTHON" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
    for init in noise-aligned average; do
        "$PYTHON" benchmarks/quality.py "$run-weak-$init/model" --reference "$DATA/cifar10-train.parquet" \
            --extractor cifar10-classifier --num "$num" --repeats "$repeats" --batch 500 --device "$device" \
            --steps 50 --guidance 1.5 --output "$OUT/quality-$init.json"
    done
}

pack() {
    # bf16, 15 MB pieces: `cat model.tar.* | tar x` restores the folder.
    "$PYTHON" -m pliant.cli convert "$run-weak-noise-aligned/model" "$OUT/$name" --to pliant --dtype bf16
    tar -C "$OUT" -cf - "$name" | split -b 15M - "$OUT/model.tar."
    ls -l "$OUT"
}

case $stage in
    train | weak | measure | pack) "$stage" ;;
    all) train && weak && measure && pack ;;
    *) echo "unknown stage $stage: train, weak, measure, pack or all" >&2; exit 2 ;;
esac
