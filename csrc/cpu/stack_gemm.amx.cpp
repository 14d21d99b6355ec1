#include "cpu/stack_gemm_amx.h"

#include <immintrin.h>

namespace rvae::cpu::stack {

namespace {

constexpr int64_t kRows = 16, kTerms = 32, kColumns = 32;  // of a block of `a`; two tiles of `b` and of `c` lie side by side

struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {kRows, kRows, kRows, kRows, kRows, kRows, kRows, kRows};
};

thread_local bool configured = false;

// Lines that are fetched to the second-level cache beside a product, a few at each step.
struct Prefetch {
  const char* next = nullptr;
  int64_t lines_a_step = 0;

  void step() {
    for (int64_t i = 0; i < lines_a_step; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T1);
  }
};

// Tiles 0 and 1 hold 16 rows of c, 2 and 3 the next 16; 4 and 5 their rows of a; 6 and 7 the columns of b.
template <bool Two>
void block(int64_t k, const uint16_t* a, int64_t lda, const uint16_t* b, int64_t ldb, float* c, int64_t ldc, bool add,
           Prefetch& prefetch) {
  const int64_t a_bytes = lda * 2, b_bytes = ldb * 4, c_bytes = ldc * 4;
  float* const below = c + kRows * ldc;
  if (add) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    if constexpr (Two) {
      _tile_loadd(2, below, c_bytes);
      _tile_loadd(3, below + 16, c_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (Two) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t p = 0; p < k; p += kTerms) {
    const uint16_t* const pairs = b + p * ldb;
    _tile_loadd(4, a + p, a_bytes);
    _tile_loadd(6, pairs, b_bytes);
    _tile_loadd(7, pairs + kColumns, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    prefetch.step();
    if constexpr (Two) {
      _tile_loadd(5, a + kRows * lda + p, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  if constexpr (Two) {
    _tile_stored(2, below, c_bytes);
    _tile_stored(3, below + 16, c_bytes);
  }
}

}  // namespace

void amx_multiply(int64_t m, int64_t k, const void* a, int64_t lda, const void* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  if (!configured) {
    const Configuration configuration;
    _tile_loadconfig(&configuration);
    configured = true;
  }
  const auto* left = static_cast<const uint16_t*>(a);
  const auto* const right = static_cast<const uint16_t*>(b);
  // Packed panels lie one behind the other, and the next product takes the next one. Of a deep network's weights the first rows would wait
  // for it from the third-level cache.
  Prefetch prefetch;
  if (ldb == kColumns) {
    constexpr int64_t line_values = 32;
    const int64_t steps = (m + 2 * kRows - 1) / (2 * kRows) * (k / kTerms), lines = k * kColumns / line_values;
    prefetch = {reinterpret_cast<const char*>(right + k * kColumns), (lines + steps - 1) / steps};
  }
  int64_t row = 0;
  for (; row + 2 * kRows <= m; row += 2 * kRows) block<true>(k, left + row * lda, lda, right, ldb, c + row * ldc, ldc, add, prefetch);
  for (; row + kRows <= m; row += kRows) block<false>(k, left + row * lda, lda, right, ldb, c + row * ldc, ldc, add, prefetch);
  if (row == m) return;
  // There is no room for a whole block of c.
  alignas(64) float rest[kRows * kColumns];
  block<false>(k, left + row * lda, lda, right, ldb, rest, kColumns, false, prefetch);
  for (int64_t r = 0; r < m - row; ++r) {
    float* const to = c + (row + r) * ldc;
    for (int64_t column = 0; column < kColumns; ++column) to[column] = (add ? to[column] : 0.0f) + rest[r * kColumns + column];
  }
}

void amx_release() {
  if (!configured) return;
  _tile_release();
  configured = false;
}

}  // namespace rvae::cpu::stack
