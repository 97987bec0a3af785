#!/usr/bin/env bash
# The clothing model (issue 6): the native backbone on photos of every shape, in TAEF2 latents, nothing cropped.
#
#   gpu/clothing.sh [--smoke] [encode|train|measure|pack|all]
#
# Every stage resumes where it stopped (encode starts over, but is kept once complete), so it may be cut off and called
# again. DATA: folder with clothing-192px.parquet. WEIGHTS: folder with taef2_{encoder,decoder}.pth. OUT: results.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-../shared/data}
WEIGHTS=${WEIGHTS:-../shared/weights}
OUT=${OUT:-runs/out}
PYTHON=${PYTHON:-$(command -v .venv/bin/python || command -v python3)}
export PYTHONPATH="src:${PYTHONPATH:-}" PYTHONUNBUFFERED=1
device=$("$PYTHON" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
run=runs/clothing/gpu latents=runs/clothing/latents-192 steps=40000 num=256 sampling=24
sizes=(24x18 18x24 24x12) encode_options=(--side 192 --flip) train_options=()
if [[ ${1:-} == --smoke ]]; then
    shift
    run=runs/clothing/smoke latents=runs/clothing/latents-smoke steps=3 num=4 sampling=2
    sizes=(8x6 6x8) encode_options=(--side 64 --limit 160)
    train_options=(model.flexible.width=64 model.flexible.depth=1 model.flexible.heads=2 "model.flexible.input_size=[8,6]"
        "model.flexible.train_sides=[2,24]" "model.flexible.train_pixels=[16,64]" tokens=600 data.flip=false)
fi
stage=${1:-all}
mkdir -p "$OUT"

encode() {
    [[ -f $latents/latents.json ]] || "$PYTHON" -m pliant.cli encode "$DATA/clothing-192px.parquet" "$latents" \
        --autoencoder "$WEIGHTS/taef2_encoder.pth" --patch 2 --precision bf16 --device "$device" "${encode_options[@]}"
}

train() {
    "$PYTHON" -m pliant.cli train configs/clothing.yaml --resume "steps=$steps" "data.source=$latents" "output=$run" \
        "${train_options[@]}"
}

measure() {
    "$PYTHON" benchmarks/any_size_quality.py "$run/model" --latents "$latents" --sizes "${sizes[@]}" --num "$num" \
        --autoencoder "$WEIGHTS/taef2_encoder.pth" --steps "$sampling" --device "$device" --output "$OUT/clothing-quality"
}

pack() {
    # bf16, 15 MB pieces: `cat model.tar.* | tar x` restores the folder.
    "$PYTHON" -m pliant.cli convert "$run/model" "$OUT/clothing" --to pliant --dtype bf16
    tar -C "$OUT" -cf - clothing | split -b 15M - "$OUT/clothing.tar."
    ls -l "$OUT"
}

case $stage in
    encode | train | measure | pack) "$stage" ;;
    all) encode && train && measure && pack ;;
    *) echo "unknown stage $stage: encode, train, measure, pack or all" >&2; exit 2 ;;
esac
