#!/usr/bin/env bash
# Builds the emulator into a folder: build.sh FOLDER. Then
#   LD_LIBRARY_PATH=FOLDER LOWRANK_CUDA_LIBS=FOLDER cargo test -- --include-ignored
# takes it for a CUDA device.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
folder="$1"
mkdir -p "$folder"
# C++ has no `extern "C" static`.
sed 's/extern "C" __global__/__global__/' "$here/../../src/cuda/kernels.cu" > "$folder/kernels.inc"
"${CXX:-c++}" -std=c++17 -O2 -shared -fPIC -fvisibility=hidden -U_FORTIFY_SOURCE -Wall -Wextra -I "$folder" \
    -o "$folder/libemulator.so" "$here/emulator.cpp"
# As files of their own: a loader takes links to one file for one library, whose names it then does not learn.
for name in libcuda.so.1 libnvrtc.so.13 libcublasLt.so.13 libcublas.so.13 libcusolver.so.12; do
    cp "$folder/libemulator.so" "$folder/$name"
done
rm "$folder/libemulator.so"
