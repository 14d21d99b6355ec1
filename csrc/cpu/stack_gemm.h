// The matrix products of a residual stack: tile by panel, through the micro-kernels that torch carries
// (at::native::cpublas::brgemm, which generates code for AVX-512 and AVX2, and is a plain GEMM elsewhere); bf16 on AMX by our own.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/stack_kernels.h"

namespace rvae::cpu::stack {

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline int64_t size_of(Kind kind) {
  return kind == Kind::f32 ? 4 : 2;
}

// 32-bit words that hold `n` values along the reduced dimension.
inline int64_t words(int64_t n, Kind kind) {
  return kind == Kind::f32 ? n : (n + 1) / 2;
}

// What the rows and the terms of a product are rounded up to. AMX takes blocks of 16 rows by 32 terms. (torch's micro-kernels take
// remainders, and configure the tiles anew for them: 96 rows by 258 terms take 3.4 times as long as by 256.) Elsewhere multiples of 4
// rows bound the number of micro-kernels that get generated, and bf16 comes in pairs.
int64_t product_rows(int64_t rows, Kind kind);
int64_t product_terms(int64_t terms, Kind kind);

// Buffers of rows have room for whole blocks of this many, which product_rows and product_terms never exceed.
constexpr int64_t kRowBlock = 32;

// Whether bf16 products run on AMX.
bool uses_amx();

// Whether bf16 products run on this machine (AVX512_BF16 or AMX). Tried once, with a product whose result is known.
bool has_bf16_products();

// A product's terms are added up in one chain of fp32 additions, whose rounding errors grow with its length: on operands of one
// sign to 4 times those of PyTorch's products at 784 terms, and 11 times at 4096 (its BLAS on x86, MKL, takes 192 terms at a time).
// So a product of more than kLongestChain terms is made in blocks, each summed from zero and then added to those before it, which
// leaves up to twice PyTorch's errors for a hundredth of the product's time. Blocks are equally long but for the last, and whole
// cache lines.
constexpr int64_t kLongestChain = 512, kBlock = 400;

// Calls f(first, count) for the blocks of a product of `k` terms. They depend on `k` alone: a row's sums do not depend on the rows
// beside it.
template <class F>
void for_blocks(int64_t k, F f) {
  if (k <= kLongestChain) return f(0, k);
  const int64_t blocks = (k + kBlock - 1) / kBlock, length = round_up((k + blocks - 1) / blocks, 16);
  for (int64_t first = 0; first < k; first += length) f(first, std::min(length, k - first));
}

// c[m, 32] = or += a[m, k] * b[k, 32]. `ld` counts values. In bf16 b holds pairs of rows, `k` is one of product_terms, and `a` can be
// read for whole blocks of kRowBlock rows. bf16 goes without
// blocks: the rounding of what it multiplies and writes is hundreds of times that of its sums.
void multiply(Kind kind, int64_t m, int64_t k, const void* a, int64_t lda, const void* b, int64_t ldb, float* c, int64_t ldc,
              bool add);

// To be called by a thread when its products are done: gives the tile registers of AMX back.
void release_products(Kind kind);

// Panels of a weight [out, in], as the right-hand side of a product. One panel takes panel_words(reduced, kind) words.
inline int64_t panel_words(int64_t reduced, Kind kind) {
  return round_up(words(reduced, kind), 16) * kPanel;
}

// rows * weight^T: panel `panel` holds outputs 32 * panel ...; `scratch` has room for panel_words(in, kind).
void pack_forward(const float* weight, int64_t out, int64_t in, int64_t panel, Kind kind, uint32_t* packed, uint32_t* scratch);

// rows * weight: panel p holds inputs 32 * p ... of all outputs. Packs kPackRows outputs from `first` on into all panels.
constexpr int64_t kPackRows = 32;
void pack_backward(const float* weight, int64_t out, int64_t in, int64_t first, Kind kind, uint32_t* packed);

}  // namespace rvae::cpu::stack
