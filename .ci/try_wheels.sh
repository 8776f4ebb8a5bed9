#!/usr/bin/env bash
# The wheels in dist/, installed one after the other into an environment of their own and used as a
# user would: no compiler, no Triton and no checkout in reach, nothing that development brings.
# Usage: .ci/try_wheels.sh python torch==VERSION
set -euo pipefail
python=$1 torch=$2
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH PYTHONHOME

"$python" -m venv "$work/env"
bin=$work/env/bin
"$bin/python" -m pip install --quiet "$torch"
cp .ci/try_installed.py "$work"
try() {
  (cd "$work" && env -i PATH= HOME="$work" LANG=C.UTF-8 OMP_NUM_THREADS=2 \
    "$bin/python" try_installed.py "$@")
}
shopt -s nullglob
for wheel in dist/*-manylinux_*.whl; do
  "$bin/python" -m pip install --quiet "$wheel" -c constraints.txt
  try compiled
done
# Where it is the only one, pip takes it and brings the same packages.
"$bin/python" -m pip uninstall --quiet --yes qadapter
"$bin/python" -m pip install --quiet dist/*-none-any.whl -c constraints.txt
try pure
