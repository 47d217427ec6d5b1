#!/usr/bin/env bash
# bash tools/run_tests.sh [pytest options]
#
# Makes a virtual environment (.venv-tests, or $VENV) with the full stack, then runs ruff and pytest. The first run compiles
# mmcv's CPU operators, about 5 minutes; a folder of built wheels can be named in $WHEELS (default ../shared/wheels).
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-$PWD/.venv-tests}
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
        mmengine==0.10.7 mmcv==2.1.0 mmpretrain==1.2.0 -r requirements/det.txt -r requirements/seg.txt \
        -r requirements/quickstart.txt -r requirements/teachers.txt -r requirements/tests.txt -e .
    touch "$VENV/installed"
fi

echo '== ruff'
"$python" -m ruff check .
echo '== pytest'
export PATH=$VENV/bin:$PATH OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m pytest -n "${PYTEST_WORKERS:-2}" --dist loadgroup "$@"
