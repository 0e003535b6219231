#!/bin/sh
# The peer of the benchmarks: llama.cpp as vendored in llama-cpp-python, compiled here for this very processor, and that
# package's server, in a virtual environment of their own (build/peer-venv). Takes a C++ compiler and some ten minutes on two cores.
set -e
cd "$(dirname "$0")/.."
VENV=${1:-build/peer-venv}
VERSION=0.3.36
"${PYTHON:-python3}" -m venv "$VENV"
CMAKE_ARGS="-DGGML_NATIVE=ON -DCMAKE_BUILD_TYPE=Release -DLLAVA_BUILD=ON -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF" \
  "$VENV/bin/python" -m pip --disable-pip-version-check install --quiet --no-binary llama-cpp-python "llama-cpp-python[server]==$VERSION"
"$VENV/bin/python" -c 'import llama_cpp; print("llama-cpp-python", llama_cpp.__version__, "is ready")'
