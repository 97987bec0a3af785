#!/usr/bin/env bash
# Few steps on CIFAR-10 from the model of gpu/cifar10.sh: reflow and rfpp on one store of pairs, CTM and MeanFlow on the
# real images; then the table.
#
#   gpu/distill.sh [--smoke] [reflow|rfpp|ctm|mean-flow|measure|all]
#
# Every stage resumes where it stopped, so it may be cut off and called again. TEACHER: the trained model (default: what
# gpu/cifar10.sh leaves). DATA: folder with cifar10-train.parquet. OUT: where results go.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-../shared/data}
OUT=${OUT:-runs/out}
TEACHER=${TEACHER:-runs/cifar10-flow/model}
PYTHON=${PYTHON:-$(command -v .venv/bin/python || command -v python3)}
export PYTHONPATH="src:${PYTHONPATH:-}" PYTHONUNBUFFERED=1
limit=() run=runs/cifar10-few num=10000 repeats=3 reference=cifar10-train.parquet counts=(1 2 4 8)
# 250,000 pairs of 18 Heun steps (35 evaluations), as rfpp's 1M for its own models; 20,000 steps of 256.
pairs=(pairs.count=250000 pairs.shard_size=5000 pairs.batch_size=1000 pairs.plan.steps=18 pairs.plan.solver=heun)
train=(
    train.steps=20000 train.batch_size=256 train.precision=bf16 train.flip=true train.log_every=100
    train.optimizer.lr=2e-4 train.optimizer.warmup=1000 train.ema.decay=0.9999 train.checkpoint.every=1000
)
if [[ ${1:-} == --smoke ]]; then
    shift
    run=runs/smoke-few num=20 repeats=2 reference=cifar10-test.parquet counts=(1)
    TEACHER=runs/smoke-few-teacher
    pairs=(pairs.count=32 pairs.shard_size=16 pairs.plan.steps=2 pairs.plan.solver=heun)
    limit=(data.limit=64)
    train=(train.steps=2 train.batch_size=8 train.log_every=1 train.checkpoint.every=1)
    if [[ ! -d $TEACHER ]]; then # a small random model of CIFAR-10's shape
        "$PYTHON" - "$TEACHER" <<'PY'
import sys

import torch

import pliant
from pliant.paths import NetworkTime, get_path

config = pliant.DiTConfig((32, 32), (4, 4), in_channels=3, width=32, depth=1, heads=2, num_classes=10, learn_sigma=False)
model = pliant.Denoiser(pliant.DiT(config), get_path("linear"), "velocity", NetworkTime(scale=1000.0))
for parameter in model.parameters():
    parameter.data.add_(0.05 * torch.randn_like(parameter))
pliant.save(model, sys.argv[1])
PY
    fi
fi
stage=${1:-all}
mkdir -p "$OUT"

distill() {
    # The second recipe takes the first one's pairs.
    local recipe=$1 resume=() shared=("${pairs[@]}")
    shift
    [[ -d $run/$recipe ]] && resume=(--resume)
    [[ $recipe == rfpp && -d $run/reflow/pairs-1 ]] && shared=("pairs.folder=$run/reflow/pairs-1")
    "$PYTHON" -m pliant.cli distill "$recipe" --teacher "$TEACHER" --out "$run/$recipe" "${resume[@]}" \
        "${shared[@]}" "${train[@]}" "$@"
}

jumps() {
    # Real images; the teacher's velocities are the target. MeanFlow's derivative, a difference, wants fp32.
    local recipe=$1 resume=()
    shift
    [[ -d $run/$recipe ]] && resume=(--resume)
    "$PYTHON" -m pliant.cli distill "$recipe" --teacher "$TEACHER" --out "$run/$recipe" "${resume[@]}" \
        "data.source=$DATA/cifar10-train.parquet" data.split=train "${limit[@]}" "${train[@]}" "$@"
}

measure() {
    local device
    device=$("$PYTHON" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
    "$PYTHON" benchmarks/few_step.py --teacher "$TEACHER" --out "$run" --only reflow rfpp ctm mean-flow --no-train --device "$device" \
        --reference "$DATA/$reference" --extractor cifar10-classifier --num "$num" --repeats "$repeats" \
        --counts "${counts[@]}"
    cp "$run"/few-step.{json,md} "$OUT"
}

case $stage in
    reflow) distill reflow ;;
    rfpp) distill rfpp ;; # Huber, configuration D; metric.name=perceptual-huber where lpips is installed
    ctm) jumps ctm objective.intervals=18 objective.most=17 ;;
    mean-flow) jumps mean-flow train.precision=fp32 objective.window=0.03 ;;
    measure) measure ;;
    all) distill reflow && distill rfpp && jumps ctm objective.intervals=18 objective.most=17 \
        && jumps mean-flow train.precision=fp32 objective.window=0.03 && measure ;;
    *) echo "unknown stage $stage: reflow, rfpp, ctm, mean-flow, measure or all" >&2; exit 2 ;;
esac
