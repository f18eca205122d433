#!/usr/bin/env bash
# On a machine with a GPU: build this checkout, run the tests marked gpu, then the GPU benchmarks. Needs no network, only
# a Python (PYTHON=python3) with PyTorch, Triton, pytest, scikit-build-core, pybind11, CMake and Ninja, and installs
# nothing into it: the package goes to build/gpu-site. Results go to OUT (bench/results/gpu).
# Exit status: 0 if all is well, 1 if a test or a benchmark failed, 2 without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-bench/results/gpu}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "bench/gpu.sh: $python has no PyTorch that sees a GPU here" >&2
    exit 2
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1

site=$PWD/build/gpu-site
rm -rf "$site"
"$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$site" \
    --config-settings=build-dir=build/gpu . || exit 1
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}

workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
(cd tests && "$python" -P -m pytest -q -m gpu -o cache_dir="$PWD/../build/gpu-pytest" "${workers[@]}") 2>&1 | tee "$out/tests.txt"
tests=${PIPESTATUS[0]}
"$python" bench/gpu.py --out "$out"
bench=$?
[ "$tests" -eq 0 ] && [ "$bench" -eq 0 ]
