#!/usr/bin/env bash
# bash tools/quickstart.sh [hybrid|moma]
#
# Distillation on real images in minutes on two CPU cores: makes a virtual environment (.venv-quickstart, or $VENV),
# installs what pre-training needs, trains two small teachers, distils them and compares.
#
#   hybrid (default): Hybrid Distill of a supervised ViT and an MAE, beside a student of the supervised one alone
#   moma: a MoCo v3 and an MAE, and MOMA's three ways of moving knowledge between them
#
# Everything lands in quickstart/ (or $OUT); while its configs stay the same, a step that is finished is
# not run again, and one that Ctrl-C or SIGTERM has stopped goes on where it was, to the same bits.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
METHOD=${1:-hybrid}
case $METHOD in hybrid | moma) ;; *)
    echo "usage: bash tools/quickstart.sh [hybrid|moma], not '$METHOD'" >&2; exit 2 ;;
esac
OUT=${OUT:-$ROOT/quickstart} VENV=${VENV:-$ROOT/.venv-quickstart}
[[ $OUT = /* ]] || OUT=$PWD/$OUT
[[ $VENV = /* ]] || VENV=$PWD/$VENV
PYTHON=${PYTHON:-python3}
python=$VENV/bin/python
mkdir -p "$OUT"

step() { printf '\n== %3d s: %s\n' "$SECONDS" "$1"; }

step "virtual environment in $VENV"
cd "$ROOT"
if [ ! -f "$VENV/installed" ]; then
    "$PYTHON" -c 'import sys; assert sys.version_info >= (3, 10), f"Python 3.10 or newer is needed, this is {sys.version}"'
    "$PYTHON" -m venv "$VENV"
    pip=("$python" -m pip --disable-pip-version-check install -q)
    step 'installing torch'
    "${pip[@]}" torch==2.13.0 torchvision==0.28.0 -r requirements/build.txt
    step 'installing mmengine, mmcv-lite, mmpretrain, mmhdistill'
    "${pip[@]}" --no-build-isolation mmengine==0.10.7 mmcv-lite==2.1.0 mmpretrain==1.2.0 \
        -r requirements/quickstart.txt -e .
    touch "$VENV/installed"
fi

step 'photographs: 32-px crops out of scikit-image and scikit-learn'
"$python" tools/write_photo_crops.py "$OUT/data"

recipe=$(cat configs/quickstart/*.py configs/_base_/*.py configs/_base_/datasets/photo_crops.py \
    configs/_base_/schedules/quickstart.py | cksum)
cd "$OUT" # for short paths: options on the command line may hold no spaces and commas, which folders above may have
train() { # NAME CONFIG WHAT [WEIGHTS=FILE ...]
    step "$3 (log: $OUT/$1.log)"
    local key=$recipe option
    for option in "${@:4}"; do key+=" $(cksum < "${option#*=}")"; done
    if [ "$(cat "$1/finished" 2>/dev/null)" = "$key" ]; then echo 'done before'; return; fi
    local resume=
    if [ "$(cat "$1/begun" 2>/dev/null)" = "$key" ]; then
        resume=--resume # which begins where there is no checkpoint yet
        echo 'goes on where it was stopped'
    else
        rm -rf "$1"/{begun,finished,last_checkpoint,*.pth*,20*_*} # checkpoints and logs of something else
        mkdir -p "$1"
        echo "$key" > "$1/begun"
    fi
    "$python" "$ROOT/tools/train.py" "$ROOT/configs/quickstart/$2.py" --work-dir "$OUT/$1" \
        --cfg-options train_dataloader.dataset.data_root=data/train "${@:4}" $resume 2>&1 |
        tee ${resume:+-a} "$1.log" | { # one that was stopped at its end has no line more to show
        grep --line-buffered -oE "Epoch\(train\).*|teacher '.*|^  (sha256|tensors|tokens|runs) .*|.*Error.*" || true; } ||
        { tail -n 20 "$1.log" >&2; echo "failed; the whole log is $OUT/$1.log" >&2; exit 1; }
    echo "$key" > "$1/finished"
}
trained() { echo "$1/$(basename "$(cat "$1/last_checkpoint")")"; }

case $METHOD in
hybrid)
    train supervised supervised_vit-photos 'teacher 1: a supervised ViT'
    train mae mae_vit-photos 'teacher 2: a masked autoencoder'
    teachers=(
        model.teachers.supervised.checkpoint="$(trained supervised)" model.teachers.mae.checkpoint="$(trained mae)")
    train cl-only cl-only_vit-photos "for comparison: a student of teacher 1's features alone" "${teachers[@]}"
    train hybrid hdistill_vit-photos 'Hybrid Distill: features of teacher 1, token relations of teacher 2' "${teachers[@]}"
    ;;
moma)
    train moco mocov3_vit-photos 'teacher 1: a MoCo v3'
    train mae mae_vit-photos 'teacher 2: a masked autoencoder'
    teachers=(model.teachers.moco.checkpoint="$(trained moco)" model.teachers.mae.checkpoint="$(trained mae)")
    train moco-to-mae moma_moco-to-mae_vit-photos 'MOMA, mechanism 1: the MAE, taught by the MoCo v3' \
        "${teachers[@]}" model.backbone.init_from.checkpoint="$(trained mae)"
    train mae-to-moco moma_mae-to-moco_vit-photos 'MOMA, mechanism 2: the MoCo v3, taught by the MAE' \
        "${teachers[@]}" model.backbone.init_from.checkpoint="$(trained moco)"
    train moco-mae moma_moco-mae_vit-photos 'MOMA, mechanism 3: a student from random weights, taught by both' \
        "${teachers[@]}"
    ;;
esac

step 'comparing'
"$python" "$ROOT/tools/analysis/quickstart_report.py" "$OUT" "$METHOD"
step 'finished'
