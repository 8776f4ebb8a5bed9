#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most 9 minutes, from a bare checkout: builds the
# native libraries, runs the GPU tests and the benchmarks, and leaves results small enough to commit
# in benchmarks/results, with a copy in $OUT if that is set.
#
#   benchmarks/gpu.sh                 # on a machine with a GPU
#   benchmarks/gpu.sh --dry-run       # tiny sizes on the CPU: does this script itself work?
#
# PYTHON: the Python to use (default python3), with torch and triton; nothing is installed into it.
# COMMIT: what the checkout is at, where it is a copy without git.
# WHEELS: a folder of peers' wheels (liger-kernel, cut-cross-entropy, trl, datasets, ...); peers that
#         are not there are listed as such.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
SECONDS=0
LIMIT=540
dry_run=()
device=cuda
case "${1:-}" in
  "") ;;
  --dry-run) dry_run=(--dry-run) device=cpu ;;
  *) echo "usage: benchmarks/gpu.sh [--dry-run]" >&2; exit 2 ;;
esac

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
results=benchmarks/results
if [ -n "${dry_run[*]}" ]; then results=$scratch/results; fi
mkdir -p "$results" "$scratch/log"
failed=()

# run NAME SECONDS COMMAND...: at most that long, and never past the limit of the whole.
run() {
  local name=$1 seconds=$2 left=$((LIMIT - SECONDS))
  shift 2
  if [ "$left" -lt 10 ]; then
    echo "== $name: skipped, no time left"
    failed+=("$name")
    return
  fi
  echo "== $name ($SECONDS s so far)"
  timeout $((seconds < left ? seconds : left)) "$@" 2>&1 | tee "$scratch/log/$name.txt"
  local status=${PIPESTATUS[0]}
  if [ "$status" -ne 0 ]; then
    echo "== $name: exit code $status"
    failed+=("$name")
  fi
}

if [ -n "${WHEELS:-}" ]; then
  run peers 60 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile \
    --target "$scratch/peers" "$WHEELS"/*.whl
  export PYTHONPATH="$PYTHONPATH:$scratch/peers"
fi

if [ "$device" = cuda ]; then
  # Only this GPU's architecture: sm_90a and sm_100a carry features that plain 90 and 100 lack.
  QADAPTER_CUDA_ARCHS=$("$PYTHON" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + ("a" if (major, minor) in ((9, 0), (10, 0)) else ""))') || exit
  export QADAPTER_CUDA_ARCHS
  run build 150 "$PYTHON" setup.py --quiet build_native --inplace
  workers=()  # Triton's compiler keeps a core busy while the GPU waits
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n 4); fi
  run tests 150 "$PYTHON" -m pytest -q -p no:cacheprovider "${workers[@]}" tests/kernels -m gpu
else
  run tests 60 "$PYTHON" -m pytest -q -p no:cacheprovider --collect-only tests/kernels -m gpu
fi
run backends 30 "$PYTHON" -c '
from qadapter_kernels import backends
for row in backends(): print(f"{row.name}: {row.reason}; default for {row.default_for or None}")'

bench() { # NAME SECONDS ARGUMENTS...
  local name=$1 seconds=$2
  shift 2
  run "$name" "$seconds" "$PYTHON" "benchmarks/$name.py" --device "$device" --output "$results" \
    ${COMMIT:+--commit "$COMMIT"} "${dry_run[@]}" "$@"
}
if [ "$device" = cuda ]; then
  bench logits_loss 70 --budget 0.5
  bench decoding 30 --budget 0.5
  bench scaling 30 --budget 3
  bench linear_loss 300 --budget 1 --heads Llama-3.1-8B SmolLM2-135M
else
  bench logits_loss 60 --providers ours eager
  bench decoding 60
  bench scaling 60
  bench linear_loss 120 --no-memory --providers ours "eager, authors" "TRL chunked log-prob"
fi

if [ -n "${OUT:-}" ]; then
  mkdir -p "$OUT"
  cp "$results"/*."$device".png "$OUT"
  tar -czf "$OUT/results.tar.gz" -C "$results" . -C "$scratch" log
fi
echo "== done in $SECONDS s; failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
