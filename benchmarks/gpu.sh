#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most 9 minutes, from a bare checkout: builds the
# native libraries, runs the GPU tests and the benchmarks, and leaves results small enough to commit
# in benchmarks/results, with a copy in $OUT if that is set. A part that fails or runs out of time
# leaves the others, and what it has measured so far, standing.
#
#   benchmarks/gpu.sh                 # on a machine with a GPU
#   benchmarks/gpu.sh --dry-run       # tiny sizes on the CPU, in as long as it takes: does this
#                                     # script itself work?
#
# PYTHON: the Python to use (default python3), with torch, triton, transformers and peft; nothing is
#         installed into it.
# COMMIT: what the checkout is at, where it is a copy without git.
# WHEELS: a folder of wheels that are put beside it for this run, for a machine without a registry:
#         pip download --no-deps -r benchmarks/gpu-wheels.txt -d FOLDER. Peers that are not there are
#         listed as such.
# PARTS:  names of the parts to run (default all): build tests sanitizer linear_loss ...
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
SECONDS=0
LIMIT=540
dry_run=()
device=cuda
case "${1:-}" in
  "") ;;
  --dry-run) dry_run=(--dry-run) device=cpu LIMIT= ;;
  *) echo "usage: benchmarks/gpu.sh [--dry-run]" >&2; exit 2 ;;
esac

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
results=benchmarks/results
if [ "$device" = cpu ]; then results=$scratch/results; fi
mkdir -p "$results" "$scratch/log"
failed=()

# run NAME SECONDS COMMAND...: at most that long, and never past the limit of the whole.
run() {
  local name=$1 seconds=$2 limited=()
  shift 2
  if [ -n "${PARTS:-}" ] && [[ " $PARTS " != *" $name "* ]]; then return; fi
  if [ -n "$LIMIT" ]; then
    local left=$((LIMIT - SECONDS))
    if [ "$left" -lt 10 ]; then
      echo "== $name: skipped, no time left"
      failed+=("$name")
      return
    fi
    limited=(timeout --kill-after=5 $((seconds < left ? seconds : left)))
  fi
  echo "== $name ($SECONDS s so far)"
  "${limited[@]}" "$@" 2>&1 | tee "$scratch/log/$name.txt"
  local status=${PIPESTATUS[0]}
  if [ "$status" -ne 0 ]; then
    echo "== $name: exit code $status"
    failed+=("$name")
  fi
}

bench() { # NAME SECONDS ARGUMENTS...
  local name=$1 seconds=$2
  shift 2
  run "$name" "$seconds" "$PYTHON" "benchmarks/$name.py" --device "$device" --output "$results" \
    ${COMMIT:+--commit "$COMMIT"} "${dry_run[@]}" "$@"
}

if [ -n "${WHEELS:-}" ]; then
  run peers 40 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile \
    --target "$scratch/peers" "$WHEELS"/*.whl
  export PYTHONPATH="$PYTHONPATH:$scratch/peers"
fi

test=(-m pytest -q -p no:cacheprovider -m gpu)
if [ "$device" = cuda ]; then
  # Only this GPU's architecture: sm_90a and sm_100a carry features that plain 90 and 100 lack.
  QADAPTER_CUDA_ARCHS=$("$PYTHON" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + ("a" if (major, minor) in ((9, 0), (10, 0)) else ""))') || exit
  export QADAPTER_CUDA_ARCHS
  run build 120 "$PYTHON" setup.py --quiet build_native --inplace
  workers=()  # Triton's compiler keeps a core busy while the GPU waits
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n 4); fi
  run tests 110 "$PYTHON" "${test[@]}" "${workers[@]}" tests/kernels
  run sampling 40 "$PYTHON" -m pytest -q -p no:cacheprovider tests/policy/test_sampling.py
  if command -v compute-sanitizer >/dev/null; then
    run sanitizer 50 compute-sanitizer --error-exitcode 9 "$PYTHON" "${test[@]}" \
      tests/kernels/test_cuda_gpu.py -k "edge_of_support or rows_of_many_clusters"
  fi
else
  run tests 60 "$PYTHON" "${test[@]}" --collect-only tests/kernels
fi
run backends 30 "$PYTHON" -c '
from qadapter_kernels import backends
for row in backends(): print(f"{row.name}: {row.reason}; default for {row.default_for or None}")'

if [ "$device" = cuda ]; then
  bench linear_loss 130 --budget 0.6 --heads Llama-3.1-8B Llama-3.2-1B
  bench logits_loss 50 --budget 0.4
  bench training_step 120 --budget 4
  bench generation 70 --budget 3 --batches 1 8 32
  bench decoding 30 --budget 0.5
  bench scaling 30 --budget 3
else
  bench linear_loss 120 --no-memory --providers ours "eager, authors" "TRL chunked log-prob"
  bench logits_loss 60 --providers ours eager
  bench training_step 180 --rounds 1
  bench generation 60 --batches 1 2
  bench decoding 60
  bench scaling 60
fi

if [ -n "${OUT:-}" ]; then
  mkdir -p "$OUT"
  cp "$results"/*."$device".png "$OUT" || echo "== no picture was drawn"
  tar -czf "$OUT/results.tar.gz" -C "$results" . -C "$scratch" log
fi
echo "== done in $SECONDS s; failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
