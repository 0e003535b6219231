#!/bin/sh
# The peers of load.py: llama.cpp's own server and its llama-bench, from the same sources as
# install_peer.sh, compiled for this very processor in build/peer-tools. Takes a C++ compiler, cmake and ninja (both are in .venv), and
# some fifteen minutes on two cores.
set -e
cd "$(dirname "$0")/.."
DIRECTORY=${1:-build/peer-tools}
VERSION=0.3.36
PATH="$PWD/.venv/bin:$PATH"
mkdir -p "$DIRECTORY"
python -m pip --disable-pip-version-check download --quiet --no-deps --no-build-isolation --no-binary llama-cpp-python \
  --dest "$DIRECTORY" "llama-cpp-python==$VERSION"
tar xzf "$DIRECTORY/llama_cpp_python-$VERSION.tar.gz" -C "$DIRECTORY"
cmake -G Ninja -S "$DIRECTORY/llama_cpp_python-$VERSION/vendor/llama.cpp" -B "$DIRECTORY" -DCMAKE_BUILD_TYPE=Release \
  -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
  -DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_TOOLS=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF > "$DIRECTORY/cmake.log"
ninja -C "$DIRECTORY" llama-bench llama-server
echo "$DIRECTORY/bin has llama-bench and llama-server"
