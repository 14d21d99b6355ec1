#!/usr/bin/env bash
# Compile the .cu files without linking: csrc/cuda for each shipped GPU architecture, kernels/hopper (which is compiled at
# run time) for sm_90a in its largest variants. nvcc needs neither a GPU nor torch for that. Prints registers and spills.
set -euo pipefail
cd "$(dirname "$0")/.."
shopt -s nullglob
sources=(csrc/cuda/*.cu)
nvcc=${CUDACXX:-nvcc}
if ! command -v "$nvcc" > /dev/null; then
  echo "CUDA: skipped, $nvcc is not on PATH"
  exit 0
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"$nvcc" --version | tail -n 2 | head -n 1
hopper() { # source, options
  echo "CUDA: $* for sm_90a"
  "$nvcc" -std=c++17 -gencode arch=compute_90a,code=sm_90a -Xptxas -v -cubin -o "$out/a.cubin" "${@:2}" "$1" 2>&1 |
    grep -E "error|warning|Compiling entry|registers|spill" || true
  [ -s "$out/a.cubin" ] || { echo "CUDA: $1 does not compile"; exit 1; }
  rm -f "$out/a.cubin"
}
hopper kernels/hopper/pack.cu
for sizes in "-DKC=2 -DPANELS=1" "-DKC=8 -DPANELS=4"; do
  # shellcheck disable=SC2086 # options, one a word
  hopper kernels/hopper/layer.cu -DACT=5 -DCL=2 $sizes
done
for source in "${sources[@]}"; do
  for arch in 80 90a 100a; do
    echo "CUDA: $source for sm_$arch"
    "$nvcc" -std=c++17 -O3 -Icsrc -gencode "arch=compute_$arch,code=sm_$arch" -Xptxas -v -cubin -o "$out/a.cubin" "$source" 2>&1 |
      grep -E "error|Compiling entry|registers|spill" || true
    [ -s "$out/a.cubin" ] || { echo "CUDA: $source does not compile for sm_$arch"; exit 1; }
    rm -f "$out/a.cubin"
  done
done
