#!/usr/bin/env bash
# llama.cpp's server and converters, from the sources inside llama-cpp-python's: one that a package
# registry has, of a known version.
#
#   tests/engines/llama_cpp.sh .venv-llama 0.3.36
set -euo pipefail
environment=$(realpath "$1") version=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$environment/bin/python" -m pip install --quiet cmake ninja \
  torch==2.13.0 transformers sentencepiece protobuf  # what its converters import
"$environment/bin/python" -m pip download --quiet --no-deps --no-binary llama-cpp-python \
  --dest "$work" "llama-cpp-python==$version"
tar -xzf "$work/llama_cpp_python-$version.tar.gz" -C "$work"
rm -rf "$environment/llama.cpp"
mv "$work/llama_cpp_python-$version/vendor/llama.cpp" "$environment/llama.cpp"

export PATH="$environment/bin:$PATH"
cmake -G Ninja -S "$environment/llama.cpp" -B "$work/build" -DCMAKE_BUILD_TYPE=Release \
  -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
  -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
  -DLLAMA_OPENSSL=OFF >"$work/log" || { cat "$work/log"; exit 1; }
cmake --build "$work/build" --target llama-server >"$work/log" || { tail -n 50 "$work/log"; exit 1; }
install "$work/build/bin/llama-server" "$environment/bin/"
echo "of llama-cpp-python $version" >"$environment/version"
