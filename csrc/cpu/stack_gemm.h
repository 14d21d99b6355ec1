// The matrix products of a residual stack: tile by panel, through the micro-kernels that torch carries
// (at::native::cpublas::brgemm, which generates code for AMX, AVX-512 and AVX2, and is a plain GEMM elsewhere).
#pragma once

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

// Whether bf16 products run on this machine (AVX512_BF16 or AMX). Tried once, with a product whose result is known.
bool has_bf16_products();

// c[m, 32] = or += a[m, k] * b[k, 32]. `ld` counts values; `k` is even for bf16, whose b holds pairs of rows.
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
