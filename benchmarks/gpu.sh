#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most 9 minutes, from a bare checkout, in stages that
# are each of use alone:
#
#   a  150 s  builds the native libraries; which backend serves each operator (a fallback is a
#             failure); every kernel's results, at real sizes too; compute-sanitizer on a few cases
#   b  200 s  the hidden level beside everybody else's, N = 1,024 to 32,768; the logits level
#   c  200 s  the training step of Llama-3.1-8B's shape
#   d  100 s  decoding: generate(), one stream and two, and the sampler
#
# Where all are asked for they share the 9 minutes in these proportions, and what one leaves over
# goes to those behind it. A part that fails or runs out of time leaves the others, and what it has
# measured so far, standing; the exit code tells. A short table comes last.
#
#   benchmarks/gpu.sh                 # on a machine with a GPU
#   benchmarks/gpu.sh --dry-run       # tiny sizes on the CPU, in as long as it takes: does this
#                                     # script itself work?
#
# PYTHON: the Python to use (default python3), with torch, triton, transformers and peft; nothing is
#         installed into it.
# COMMIT: what the checkout is at, where it is a copy without git.
# WHEELS: a folder of wheels that are put beside it for this run, for a machine without a registry
#         (benchmarks/README.md). Peers that are not there are listed as such.
# OUT:    a folder for results.tar.gz (records, pictures, logs) and summary.txt, both written anew
#         after every stage. Default: records and pictures go to benchmarks/results.
# PARTS:  stages or parts to run (default all stages): a b c d, build served_by tests ... scaling
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
SECONDS=0
LIMIT=540
PACKING=10  # of it, kept for the last archive and table
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
if [ "$device" = cpu ] || [ -n "${OUT:-}" ]; then results=$scratch/results; fi
mkdir -p "$results" "$scratch/log"
failed=()

# --- time ---------------------------------------------------------------------------------------

declare -A limits=([a]=150 [b]=200 [c]=200 [d]=100)
declare -A parts=(
  [a]="build served_by real_sizes tests sampling sanitizer"
  [b]="linear_loss logits_loss linear_loss_1b linear_loss_compiled linear_loss_forward"
  [c]="training_step training_step_1b"
  [d]="decoding generation generation_8b"
)

wanted() { # NAME...: whether PARTS names one of them, or nothing
  local name
  for name in "$@"; do
    if [ -z "${PARTS:-}" ] || [[ " $PARTS " == *" $name "* ]]; then return 0; fi
  done
  return 1
}

stage() { # NAME: begins it, with its share of the time that is left; whether there is anything to do
  current=$1
  # shellcheck disable=SC2086
  wanted "$1" ${parts[$1]} || return 1
  [ -n "$LIMIT" ] || return 0
  local name sum=0 left=$((LIMIT - PACKING - SECONDS))
  for name in a b c d; do
    # shellcheck disable=SC2086
    if [[ ! "$name" < "$1" ]] && wanted "$name" ${parts[$name]}; then
      sum=$((sum + limits[$name]))
    fi
  done
  local share=$((left * limits[$1] / sum))
  stage_end=$((SECONDS + (share < limits[$1] ? share : limits[$1])))
  echo "=== stage $1: $((stage_end - SECONDS)) s"
}

left() { echo $((stage_end - SECONDS)); } # seconds, of the stage

# run NAME SECONDS COMMAND...: at most that long, and never past the end of the stage.
run() {
  local name=$1 seconds=$2 limited=()
  shift 2
  wanted "$current" "$name" || return
  if [ -n "$LIMIT" ]; then
    if [ "$(left)" -lt 8 ]; then
      echo "== $name: skipped, no time left in the stage"
      failed+=("$name")
      return
    fi
    limited=(timeout --kill-after=5 $((seconds < $(left) ? seconds : $(left))))
  fi
  echo "== $name ($SECONDS s so far)"
  "${limited[@]}" "$@" 2>&1 | tee "$scratch/log/$name.txt"
  local status=${PIPESTATUS[0]}
  if [ "$status" -ne 0 ]; then
    echo "== $name: exit code $status"
    failed+=("$name")
  fi
}

script() { # NAME FILE SECONDS ARGUMENTS...
  local name=$1 file=$2 seconds=$3
  shift 3
  run "$name" "$seconds" "$PYTHON" "benchmarks/$file.py" --device "$device" --output "$results" \
    ${COMMIT:+--commit "$COMMIT"} "${dry_run[@]}" "$@"
}

bench() { # NAME SECONDS ARGUMENTS...: a script of that name
  local name=$1
  shift
  script "$name" "$name" "$@"
}

# begin SECONDS LAST: the option that has a script begin nothing new when LAST of its seconds, or of
# what is left of the stage, are still to come: it wants to end its last shape and draw its picture.
begin() {
  [ -n "$LIMIT" ] || return 0
  local seconds=$(($1 < $(left) ? $1 : $(left)))
  echo "--seconds $((seconds > $2 ? seconds - $2 : 1))"
}

pack() { # what there is so far, to $OUT
  "$PYTHON" benchmarks/summary.py "$results" --device "$device" >"$scratch/summary.txt" 2>&1
  echo "failed: ${failed[*]:-none}" >>"$scratch/summary.txt"
  [ -n "${OUT:-}" ] || return 0
  mkdir -p "$OUT"
  cp "$scratch/summary.txt" "$OUT/summary.txt"
  tar -czf "$scratch/results.tar.gz" -C "$scratch" results log summary.txt
  mv "$scratch/results.tar.gz" "$OUT/results.tar.gz"
}

# --- what is brought along ----------------------------------------------------------------------

if [ -n "${WHEELS:-}" ]; then
  current=peers stage_end=${LIMIT:-0} PARTS="${PARTS:+$PARTS peers}"
  # quack takes a function for a library's only in a folder of this name.
  site=$scratch/site-packages
  run peers 60 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile \
    --no-cache-dir --disable-pip-version-check --target "$site" "$WHEELS"/*.whl
  # With what .pth files add, which count in a folder of packages and not on PYTHONPATH.
  PYTHONPATH="$PYTHONPATH:$("$PYTHON" -c '
import site, sys
before = set(sys.path)
site.addsitedir(sys.argv[1])
print(*(path for path in sys.path if path not in before), sep=":")' "$site")"
fi

# --- the stages ---------------------------------------------------------------------------------

# Not through setup.py: that wants a setuptools of 2025.
build=("$PYTHON" -c 'import sys
from native_build import ROOT, build_all
build_all(ROOT / "build/native", ROOT / "kernels/qadapter_kernels/lib", *sys.argv[1:])')
test=("$PYTHON" -m pytest -q -p no:cacheprovider)
# A few cases under a checker that slows them down a lot. (Triton's test is smaller on a CPU.)
sanitized=(
  "tests/kernels/test_cuda_gpu.py::test_logits_at_the_edge_of_support[q]"
  "tests/kernels/test_cuda_gpu.py::test_rows_of_many_clusters[dtype1-3]"
  "tests/kernels/test_triton_gpu.py::test_soft_value[3-torch.bfloat16-$(
    [ "$device" = cuda ] && echo 128256 || echo 1040)]"
)
if [ "$device" = cuda ]; then
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
  if stage a; then
    # Only this GPU's architecture, with what it has beyond the plain one of its number.
    QADAPTER_CUDA_ARCHS=$("$PYTHON" -c '
import torch
major, minor = torch.cuda.get_device_capability()
special = {(9, 0): "90a", (10, 0): "100f", (10, 3): "100f"}
print(special.get((major, minor), f"{major}{minor}"))')
    export QADAPTER_CUDA_ARCHS
    run build 75 "${build[@]}"
    run served_by 45 "$PYTHON" benchmarks/served_by.py --device cuda
    run real_sizes 60 "${test[@]}" -m gpu tests/kernels/test_real_sizes.py
    workers=()  # Triton's compiler keeps a core busy while the GPU waits
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
    run tests 70 "${test[@]}" -m gpu "${workers[@]}" tests/kernels \
      --ignore tests/kernels/test_real_sizes.py
    run sampling 30 "${test[@]}" tests/policy/test_sampling.py
    if command -v compute-sanitizer >/dev/null; then
      run sanitizer 45 compute-sanitizer --error-exitcode 9 --target-processes application-only \
        "${test[@]}" -m gpu "${sanitized[@]}"
    fi
    pack
  fi
  if stage b; then
    # shellcheck disable=SC2046
    bench linear_loss 110 --heads Llama-3.1-8B --rows 16384 4096 1024 32768 --modes both \
      --compile-rows --budget 0.4 $(begin 110 30)
    # shellcheck disable=SC2046
    bench logits_loss 45 --heads Llama-3.1-8B --rows 16384 1024 4096 --compile-rows 4096 \
      --budget 0.4 $(begin 45 25)
    # shellcheck disable=SC2046
    script linear_loss_1b linear_loss 60 --heads Llama-3.2-1B --rows 16384 1024 4096 32768 \
      --modes both --compile-rows --budget 0.3 $(begin 60 18)
    # Each shape compiles for a few seconds a provider: one shape.
    script linear_loss_compiled linear_loss 70 --heads Llama-3.1-8B --rows 16384 --modes both \
      --budget 0.4 --providers ours "eager, one product" "torch.compile, authors" \
      "torch.compile, one product" "Liger DPO" "cut-cross-entropy, torch_compile"
    script linear_loss_forward linear_loss 30 --heads Llama-3.1-8B --rows 4096 --modes forward \
      --compile-rows --budget 0.4 --no-memory
    pack
  fi
  if stage c; then
    bench training_step 130 --budget 5 --pairs 8 --checkpointing on off
    script training_step_1b training_step 70 --model Llama-3.2-1B --pairs 8 --budget 3 --no-memory
    pack
  fi
  if stage d; then
    bench decoding 30 --budget 0.5
    # shellcheck disable=SC2046
    bench generation 45 --budget 2 --batches 1 8 $(begin 45 20)
    script generation_8b generation 60 --model Llama-3.1-8B --budget 2 --batches 1 --providers \
      base "ours, LoRA at strength 0.5" "two passes, PEFT" "two passes, merged" "merged export"
    pack
  fi
else
  if stage a; then
    run build 0 "${build[@]}" cpu
    run tests 0 "${test[@]}" -m gpu --collect-only tests/kernels
    run sanitizer 0 "${test[@]}" -m gpu --collect-only "${sanitized[@]}"
    run real_sizes 0 "${test[@]}" tests/kernels/test_real_sizes.py
    run served_by 0 "$PYTHON" benchmarks/served_by.py --device cpu
    pack
  fi
  if stage b; then
    everybody=(--providers ours "eager, authors" "eager, one product" "TRL chunked log-prob"
      "torch linear_cross_entropy" "Liger scaled cross-entropy" "quack chunked")
    bench linear_loss 0 --no-memory --modes both --compile-rows --seconds 600 "${everybody[@]}"
    bench logits_loss 0 --providers ours eager
    pack
  fi
  if stage c; then
    bench training_step 0 --rounds 1 --no-memory
    pack
  fi
  if stage d; then
    bench decoding 0
    bench generation 0 --batches 1 2 --seconds 600
    pack
  fi
fi

# Told apart by PARTS alone: no stage's, and whatever is left of the time is theirs.
if [[ " ${PARTS:-} " == *" scaling "* ]]; then
  current=scaling stage_end=$((${LIMIT:-0} - PACKING))
  bench scaling 60 --budget 3
  pack
fi

cat "$scratch/summary.txt"
echo "== done in $SECONDS s; failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
