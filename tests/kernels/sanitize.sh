#!/usr/bin/env bash
# The CPU backend's tests with its library built under AddressSanitizer and
# UndefinedBehaviorSanitizer. Usage: tests/kernels/sanitize.sh [python]
set -euo pipefail
python=$(realpath -s "${1:-.venv/bin/python}")
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# A copy of the package with the sanitized library, found ahead of the installed one.
cp -r kernels/qadapter_kernels "$folder/"
rm -rf "$folder/qadapter_kernels/lib"
"$python" setup.py --quiet build_native --sanitize --build-lib "$folder"
test -f "$folder/qadapter_kernels/lib/libqadapter_cpu.so" || {
  cat "$folder/qadapter_kernels/lib/build_report.json"
  exit 1
}

# The sanitizer's runtime has to be loaded before Python's allocator is used. libstdc++ comes along
# because the runtime looks up the exception machinery there when it starts, and Python has none.
# Leaks are not looked for: the interpreter never frees everything. The test with an address range
# of 4 GiB would have the sanitizer commit memory for its shadow. Nothing is captured: a report ends
# the process before pytest could show it.
compiler=${CXX:-g++}
LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$folder" OMP_NUM_THREADS=2 \
  "$python" -m pytest -q --capture=no -p no:cacheprovider tests/kernels/test_cpu_backend.py \
  tests/kernels/test_state_scores.py \
  -k "not beyond_2_to_the_31" "${@:2}"
