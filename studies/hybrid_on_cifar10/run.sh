#!/usr/bin/env bash
# bash studies/hybrid_on_cifar10/run.sh cpu|gpu
#
# The whole study: data, teachers, students, measures, costs, and the results into README.md. What is finished is not
# done again. Runs go to work_dirs/ of the folder that it is called from, $JOBS of them at a time; data/cifar10 in it are
# the images. Another size needs another folder.
set -euo pipefail
SIZE=${1:-}
case $SIZE in cpu) : "${JOBS:=2}"; export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} ;; gpu) : "${JOBS:=4}" ;; *)
    echo "usage: bash studies/hybrid_on_cifar10/run.sh cpu|gpu, not '$SIZE'" >&2; exit 2 ;;
esac
HERE=$(cd "$(dirname "$0")" && pwd)
TOOLS=$HERE/../../tools
PYTHON=${PYTHON:-python}
export PYTHONPATH=$HERE/../..${PYTHONPATH:+:$PYTHONPATH}

# What the end of it needs should not be missing after hours.
"$PYTHON" -c 'import matplotlib, mmcv, scipy, sklearn'
mkdir -p work_dirs
if [ "$(cat work_dirs/size 2>/dev/null || echo "$SIZE")" != "$SIZE" ]; then
    echo "work_dirs/ here is of the size '$(cat work_dirs/size)': call this from another folder" >&2; exit 2
fi
echo "$SIZE" > work_dirs/size
[ -d data/cifar10/train ] && [ -d data/cifar10/test ] || "$PYTHON" "$HERE/data.py" data/cifar10
train() {
    for teacher; do
        [ -f work_dirs/$teacher/finished ] && continue
        resume=()
        if [ -f work_dirs/$teacher/last_checkpoint ]; then resume=(--resume); fi
        "$PYTHON" "$TOOLS/train.py" "$HERE/$SIZE/$teacher.py" --work-dir work_dirs/$teacher ${resume[@]+"${resume[@]}"}
        touch work_dirs/$teacher/finished
    done
}
# MoCo takes longest, and the sweep does without it.
train moco moco_longer & moco=$!
trap 'pkill -P $moco || true' EXIT
if [ "$JOBS" = 1 ]; then wait $moco; fi
train supervised mae mae_longer
"$PYTHON" "$TOOLS/ablate.py" "$HERE/$SIZE/sweep.py" --out work_dirs/sweep --jobs $((JOBS > 1 ? JOBS - 1 : 1))
wait $moco
"$PYTHON" "$TOOLS/ablate.py" "$HERE/$SIZE/grid.py" --out work_dirs/grid --jobs "$JOBS"
"$PYTHON" "$HERE/measure.py" "$SIZE" --jobs "$JOBS"
env -u OMP_NUM_THREADS "$PYTHON" "$HERE/cost.py" "$SIZE"
"$PYTHON" "$HERE/report.py" "$SIZE"
