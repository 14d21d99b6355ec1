// Moving tiles between layouts, and reductions over tiles; on the vectors of simd_vector.h.
#pragma once

#include "cpu/simd_vector.h"
#include "cpu/stack_kernels.h"

namespace {

template <class T>
void load_operand_as(const float* source, int64_t rows, int64_t columns, int64_t ld_source, T* operand, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) {
    T* out = operand + r * ld;
    for_columns(columns, [&](int64_t c, auto lanes) { store(out + c, load(source + r * ld_source + c, lanes), Full{}); });
    for (int64_t c = (columns + kLanes - 1) / kLanes * kLanes; c < ld; ++c) out[c] = 0;
  }
}

void load_operand(const float* source, int64_t rows, int64_t columns, int64_t ld_source, rvae::cpu::stack::RowsOut operand,
                  int64_t ld) {
  if (operand.kind == rvae::cpu::stack::Kind::f32) {
    load_operand_as(source, rows, columns, ld_source, static_cast<float*>(operand.data), ld);
  } else {
    load_operand_as(source, rows, columns, ld_source, static_cast<uint16_t*>(operand.data), ld);
  }
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 on its own _mm512_undefined_epi32
#endif
#if RVAE_LANES == 16
RVAE_INLINE void transpose_registers(__m512i (&r)[16], uint32_t* words, int64_t ld) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(words + i * ld, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(words + (i + 8) * ld, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
  }
}

RVAE_INLINE void transpose_block(const uint32_t* source, int64_t ld_source, uint32_t* words, int64_t ld) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(source + i * ld_source);
  transpose_registers(r, words, ld);
}

// The two halves of a register of bf16 as pairs.
RVAE_INLINE __m512i paired(__m512i halves) {
  const __m512i low = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i places = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16));
  return _mm512_permutexvar_epi16(places, halves);
}

RVAE_INLINE void transpose_pairs_block(const uint16_t* source, int64_t ld_source, uint32_t* words, int64_t ld) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) {
    const auto half = [&](int64_t row) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + row * ld_source)); };
    r[i] = paired(_mm512_inserti64x4(_mm512_castsi256_si512(half(2 * i)), half(2 * i + 1), 1));
  }
  transpose_registers(r, words, ld);
}
#elif RVAE_LANES == 8
RVAE_INLINE void transpose_block(const uint32_t* source, int64_t ld_source, uint32_t* words, int64_t ld) {
  __m256i r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i * ld_source));
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + i * ld), _mm256_permute2x128_si256(r[i], r[i + 4], 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + (i + 4) * ld), _mm256_permute2x128_si256(r[i], r[i + 4], 0x31));
  }
}
#else
RVAE_INLINE void transpose_block(const uint32_t* source, int64_t ld_source, uint32_t* words, int64_t ld) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) words[j * ld + i] = source[i * ld_source + j];
  }
}
#endif

void transpose_words(const uint32_t* source, int64_t rows, int64_t columns, int64_t ld_source, uint32_t* words, int64_t ld) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    for (int64_t r = 0; r < rows; r += kLanes) transpose_block(source + r * ld_source + c, ld_source, words + c * ld + r, ld);
  }
}

// Vectors of two rows as pairs of bf16.
RVAE_INLINE void store_pairs(uint32_t* p, vf even, vf odd) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(p, paired((__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even)));
#else
  typedef uint32_t vu_unaligned __attribute__((vector_size(RVAE_LANES * 4), aligned(4), may_alias));
  *reinterpret_cast<vu_unaligned*>(p) = __builtin_convertvector(narrow(even), vu) | __builtin_convertvector(narrow(odd), vu) << 16;
#endif
}
RVAE_INLINE void store(uint32_t* p, vf zero, Full) {
  store(reinterpret_cast<float*>(p), zero, Full{});
}

void transpose_pairs(const uint16_t* source, int64_t pairs, int64_t columns, int64_t ld_source, uint32_t* words, int64_t ld) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    for (int64_t p = 0; p < pairs; p += kLanes) {
#if RVAE_LANES == 16
      transpose_pairs_block(source + 2 * p * ld_source + c, ld_source, words + c * ld + p, ld);
#else
      for (int64_t i = 0; i < kLanes; ++i) {
        const uint16_t* const even = source + 2 * (p + i) * ld_source + c;
        for (int64_t j = 0; j < kLanes; ++j) words[(c + j) * ld + p + i] = even[j] | static_cast<uint32_t>(even[ld_source + j]) << 16;
      }
#endif
    }
  }
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

// Rows of a weight as rows of its panels of 32 columns, `panel_words` words apart: fp32 as it is, bf16 in pairs of rows. A
// row is read from end to end, for the panels' own order (128 bytes of each row) is what no prefetcher expects.
void spread_rows(const float* source, int64_t rows, int64_t columns, int64_t ld_source, rvae::cpu::stack::Kind kind,
                 uint32_t* packed, int64_t panel_words) {
  typedef uint32_t vu_unaligned __attribute__((vector_size(RVAE_LANES * 4), aligned(4), may_alias));
  constexpr int64_t kPanel = rvae::cpu::stack::kPanel;
  const bool pairs = kind == rvae::cpu::stack::Kind::bf16;
  for (int64_t r = 0; r < rows; r += pairs ? 2 : 1) {
    const float* const row = source + r * ld_source;
    uint32_t* const out = packed + (pairs ? r / 2 : r) * kPanel;
    const auto place = [&](int64_t c) { return reinterpret_cast<vu_unaligned*>(out + c / kPanel * panel_words + c % kPanel); };
    for_columns(columns, [&](int64_t c, auto lanes) {
      const vf first = inside(load(row + c, lanes), lanes);
      if (!pairs) {
        *place(c) = (vu)first;
        return;
      }
      const vf second = r + 1 < rows ? inside(load(row + ld_source + c, lanes), lanes) : vf{};
      *place(c) = __builtin_convertvector(narrow(first), vu) | __builtin_convertvector(narrow(second), vu) << 16;
    });
    for (int64_t c = (columns + kLanes - 1) / kLanes * kLanes; c % kPanel != 0; c += kLanes) *place(c) = vu{};
  }
}

void sum_buffers(const float* const* buffers, int64_t count, int64_t n, float* out) {
  for_columns(n, [&](int64_t c, auto lanes) {
    vf sum = load(buffers[0] + c, lanes);
    for (int64_t b = 1; b < count; ++b) sum += load(buffers[b] + c, lanes);
    store(out + c, sum, lanes);
  });
}

void merge_moments(const int64_t* counts, const float* means, const float* shifts, const float* m2s, int64_t tiles,
                   int64_t stride, int64_t columns, double* mean, double* m2) {
  for (int64_t c = 0; c < columns; ++c) {
    mean[c] = static_cast<double>(means[c]) + shifts[c];
    m2[c] = m2s[c];
  }
  int64_t merged = counts[0];
  for (int64_t t = 1; t < tiles; ++t) {
    const double share = static_cast<double>(counts[t]) / static_cast<double>(merged + counts[t]);
    const double weight = share * static_cast<double>(merged);
    const float* tile_mean = means + t * stride;
    const float* tile_shift = shifts + t * stride;
    const float* tile_m2 = m2s + t * stride;
    for (int64_t c = 0; c < columns; ++c) {
      const double delta = (static_cast<double>(tile_mean[c]) + tile_shift[c]) - mean[c];
      mean[c] += delta * share;
      m2[c] += tile_m2[c] + delta * delta * weight;
    }
    merged += counts[t];
  }
}

void sum_tiles(const float* values, int64_t tiles, int64_t stride, int64_t columns, double* out) {
  for (int64_t c = 0; c < columns; ++c) out[c] = 0.0;
  for (int64_t t = 0; t < tiles; ++t) {
    for (int64_t c = 0; c < columns; ++c) out[c] += values[t * stride + c];
  }
}

}  // namespace
