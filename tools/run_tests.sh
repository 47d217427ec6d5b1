#!/usr/bin/env bash
# [STACK=forks] bash tools/run_tests.sh [pytest options]
#
# Makes a virtual environment (.venv-tests, or $VENV) with the full stack, then runs ruff and pytest. The first run compiles
# mmcv's CPU operators, about 5 minutes; a folder of built wheels can be named in $WHEELS (default ../shared/wheels).
# STACK=forks has the maintained forks of OpenMMLab (onedl-*) in their place, in .venv-tests-forks: they have the same
# import names, so never both in one environment.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${STACK:=stock} in
    stock) folder=.venv-tests
        stack=(mmengine==0.10.7 mmcv==2.1.0 mmpretrain==1.2.0 -r requirements/det.txt -r requirements/seg.txt)
        package=(-e .) ;;
    forks) folder=.venv-tests-forks
        stack=(onedl-mmengine==0.10.12 onedl-mmcv==2.3.6 onedl-mmpretrain==1.3.6 onedl-mmdetection==3.5.1
               onedl-mmsegmentation==1.4.2 ftfy regex safetensors filelock rich)
        # What it says that it needs are the originals.
        package=(--no-deps -e .) ;;
    *) echo "STACK is '$STACK': expected stock or forks" >&2; exit 2 ;;
esac
VENV=${VENV:-$PWD/$folder}
WHEELS=${WHEELS:-../shared/wheels}
PYTHON=${PYTHON:-python3}
python=$VENV/bin/python

if [ ! -f "$VENV/installed" ]; then
    echo "== virtual environment in $VENV"
    "$PYTHON" -m venv "$VENV"
    pip=("$python" -m pip --disable-pip-version-check install -q)
    "${pip[@]}" torch==2.13.0 torchvision==0.28.0 -r requirements/build.txt
    find_links=()
    if [ -d "$WHEELS" ]; then find_links=(-f "$WHEELS"); fi
    CFLAGS='-g0 -O1' MAX_JOBS=${MAX_JOBS:-2} "${pip[@]}" --no-build-isolation ${find_links[@]+"${find_links[@]}"} \
        "${stack[@]}" -r requirements/quickstart.txt -r requirements/teachers.txt -r requirements/tests.txt
    "${pip[@]}" --no-build-isolation "${package[@]}"
    touch "$VENV/installed"
fi

echo '== ruff'
"$python" -m ruff check .
echo '== pytest'
export PATH=$VENV/bin:$PATH OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m pytest -n "${PYTEST_WORKERS:-2}" --dist loadgroup "$@"
