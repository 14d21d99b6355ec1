#include "cpu/stack_gemm.h"

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <vector>

#include "cpu/cpu_features.h"
#include "cpu/stack_gemm_amx.h"

namespace rvae::cpu::stack {

bool uses_amx() {
#ifdef RVAE_HAVE_AMX
  static const bool has = has_amx_bf16();
  return has;
#else
  return false;
#endif
}

namespace {

void multiply_bf16(int64_t m, int64_t k, const void* a, int64_t lda, const void* b, int64_t ldb, float* c, int64_t ldc,
              bool add) {
#ifdef RVAE_HAVE_AMX
  if (uses_amx()) return amx_multiply(m, k, a, lda, b, ldb, c, ldc, add);
#endif
  at::native::cpublas::brgemm(m, kPanel, k, lda, ldb, ldc, add, static_cast<const at::BFloat16*>(a),
                              static_cast<const at::BFloat16*>(b), c, /*is_vnni=*/true);
}

// The micro-kernels refuse where the instructions are missing; a product of known result also catches emulation that
// does not read the pairs as we write them.
bool try_bf16() {
  constexpr int64_t m = 4, k = 64;
  std::vector<at::BFloat16> a(kRowBlock * k), b(k * kPanel);
  std::vector<float> c(m * kPanel, -1.0f);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < k; ++j) a[i * k + j] = static_cast<float>((i + j) % 5);
  }
  const auto value = [](int64_t row, int64_t column) { return static_cast<float>((row * 3 + column) % 7) - 3.0f; };
  for (int64_t row = 0; row < k; ++row) {
    for (int64_t column = 0; column < kPanel; ++column) {
      b[(row / 2 * kPanel + column) * 2 + row % 2] = value(row, column);
    }
  }
  try {
    multiply_bf16(m, k, a.data(), k, b.data(), kPanel, c.data(), kPanel, false);
    release_products(Kind::bf16);
  } catch (const std::exception&) {
    return false;
  }
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t column = 0; column < kPanel; ++column) {
      float expected = 0.0f;
      for (int64_t j = 0; j < k; ++j) expected += static_cast<float>((i + j) % 5) * value(j, column);
      if (c[i * kPanel + column] != expected) return false;
    }
  }
  return true;
}

}  // namespace

bool has_bf16_products() {
  static const bool works = has_avx512_bf16() && try_bf16();
  return works;
}

void multiply(Kind kind, int64_t m, int64_t k, const void* a, int64_t lda, const void* b, int64_t ldb, float* c, int64_t ldc,
              bool add) {
  if (kind == Kind::bf16) return multiply_bf16(m, k, a, lda, b, ldb, c, ldc, add);
  // With `add` the micro-kernels start from zero all the same, and add c at the end.
  for_blocks(k, [&](int64_t first, int64_t count) {
    at::native::cpublas::brgemm(m, kPanel, count, lda, ldb, ldc, add || first > 0, static_cast<const float*>(a) + first,
                                static_cast<const float*>(b) + first * ldb, c, /*is_vnni=*/false);
  });
}

int64_t product_rows(int64_t rows, Kind kind) {
  return round_up(rows, kind == Kind::bf16 && uses_amx() ? 16 : 4);
}

int64_t product_terms(int64_t terms, Kind kind) {
  return kind == Kind::f32 ? terms : round_up(terms, uses_amx() ? 32 : 2);
}

void release_products(Kind kind) {
#ifdef RVAE_HAVE_AMX
  if (kind == Kind::bf16 && uses_amx()) return amx_release();
#endif
  at::native::cpublas::brgemm_release(kind == Kind::bf16);
}

void pack_forward(const float* weight, int64_t out, int64_t in, int64_t panel, Kind kind, uint32_t* packed, uint32_t* scratch) {
  const int64_t ld_words = round_up(words(in, kind), 16);
  const int64_t ld = kind == Kind::f32 ? ld_words : 2 * ld_words;
  const int64_t first = panel * kPanel;
  const int64_t count = std::min(kPanel, out - first);
  const Kernels& k = kernels();
  k.load_operand(weight + first * in, count, in, in, {scratch, kind}, ld);
  std::memset(scratch + count * ld_words, 0, static_cast<size_t>((kPanel - count) * ld_words) * 4);
  k.transpose_words(scratch, kPanel, ld_words, ld_words, packed, kPanel);
}

void pack_backward(const float* weight, int64_t out, int64_t in, int64_t first, Kind kind, uint32_t* packed) {
  const int64_t rows = std::min(kPackRows, out - first);
  const int64_t one = panel_words(out, kind);
  kernels().spread_rows(weight + first * in, rows, in, in, kind, packed + words(first, kind) * kPanel, one);
  if (first + rows < out) return;
  // What a product may take beyond the last output (product_terms).
  const int64_t begin = words(out, kind) * kPanel, end = words(product_terms(out, kind), kind) * kPanel;
  for (int64_t p = 0; p * kPanel < in; ++p) std::memset(packed + p * one + begin, 0, static_cast<size_t>(end - begin) * 4);
}

}  // namespace rvae::cpu::stack
