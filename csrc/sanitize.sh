#!/usr/bin/env bash
# Builds the extension with the address and undefined behaviour sanitizers, in a copy of the package, and runs the
# operator tests on it. Leaks are not looked for: the interpreter and torch keep memory until they end.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=build/sanitize
rm -rf "$folder"
mkdir -p "$folder"
cp -r anyflow_kernels benchmarks csrc setup.py pyproject.toml README.md LICENSE python tests "$folder"
cd "$folder" # which is what python -m pytest imports from
rm -f anyflow_kernels/_C.*
export ANYFLOW_SANITIZE=1 ANYFLOW_BUILD_EXT=1
"$python" setup.py -q build_ext --inplace
# What is allocated is filled: stores past the caches are for pages that are there.
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:max_malloc_fill_size=1073741824 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
# libstdc++ as well: the sanitizer looks up __cxa_throw before torch would load it.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libstdc++.so.6)"
tests=()
for operator in anyflow_kernels/*/__init__.py; do
    tests+=("tests/kernels/test_$(basename "$(dirname "$operator")").py")
done
# Sizes of several chunks, which threads share, and stores past the caches.
tests+=(tests/kernels/test_native.py::test_{threads_change_nothing,results_written_past_the_caches_are_the_same})
# -s: a report is the last thing that a process writes; pytest would take it along.
PYTHONPATH="$PWD:$PWD/python" OMP_NUM_THREADS=2 "$python" -m pytest -q -s -n 0 -k native "${tests[@]}" "$@"
