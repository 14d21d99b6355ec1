#!/usr/bin/env bash
# Compile csrc/cuda/*.cu for each shipped GPU architecture without linking: nvcc needs neither a GPU nor torch for that,
# since the launchers include no torch header. Prints registers and spills of every kernel.
set -euo pipefail
cd "$(dirname "$0")/.."
shopt -s nullglob
sources=(csrc/cuda/*.cu)
if [ ${#sources[@]} -eq 0 ]; then
  echo "CUDA: no sources under csrc/cuda in this version, nothing to compile"
  exit 0
fi
nvcc=${CUDACXX:-nvcc}
if ! command -v "$nvcc" > /dev/null; then
  echo "CUDA: skipped, $nvcc is not on PATH"
  exit 0
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"$nvcc" --version | tail -n 2 | head -n 1
for source in "${sources[@]}"; do
  for arch in 80 90a 100a; do
    echo "CUDA: $source for sm_$arch"
    "$nvcc" -std=c++17 -O3 -Icsrc -gencode "arch=compute_$arch,code=sm_$arch" -Xptxas -v -cubin -o "$out/a.cubin" "$source" 2>&1 |
      grep -E "error|Compiling entry|registers|spill" || true
    [ -s "$out/a.cubin" ] || { echo "CUDA: $source does not compile for sm_$arch"; exit 1; }
    rm -f "$out/a.cubin"
  done
done
