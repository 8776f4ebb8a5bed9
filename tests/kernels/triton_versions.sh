#!/usr/bin/env bash
# Compiles every Triton kernel and runs the sampler in the interpreter under every minor version of
# Triton that pyproject allows, each into a folder of its own that is removed again. Wants a Python
# with the test tools and NumPy before 2.4: the interpreters of Triton up to 3.6 need it.
#
#   tests/kernels/triton_versions.sh .venv-oldest/bin/python [minor versions]
set -euo pipefail
python=$(realpath -s "$1")
shift
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

(($#)) || set -- 3.4 3.5 3.6 3.7 3.8 3.9
for version; do
  echo "triton $version"
  "$python" -m pip install --quiet --no-deps --target "$folder/triton" "triton==$version.*"
  PYTHONPATH=$folder/triton:${PYTHONPATH:-} "$python" -m pytest -q --no-header \
    tests/kernels/test_triton_aot.py tests/kernels/test_triton_decoding.py
  rm -rf "$folder/triton"
done
