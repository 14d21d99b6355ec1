// Eight floats in an AVX register, and their loads and stores in fp32, bf16 and fp16.
// Only for files that are compiled with AVX2, FMA and F16C: everything here has internal linkage.
#pragma once

#include <immintrin.h>

#include "vec_math.h"
#include "vec_types.h"

namespace rvae::cpu {
namespace {

struct Vec {
  using Scalar = float;
  using Reg = __m256;
  static constexpr int width = 8;
  static constexpr bool streams = true;

  static Reg set(float value) { return _mm256_set1_ps(value); }

  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg load(const BFloat16* p) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  }
  static Reg load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

  // The first n < width elements; the other lanes are `fill`.
  template <class T>
  static Reg load(const T* p, int n, float fill) {
    T part[width] = {};
    std::memcpy(part, p, sizeof(T) * n);
    return _mm256_blendv_ps(set(fill), load(part), _mm256_castsi256_ps(lanes(n)));
  }

  static void store(float* p, Reg v) { _mm256_storeu_ps(p, v); }
  static void store(BFloat16* p, Reg v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, p)); }
  static void store(Half* p, Reg v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, p)); }

  template <class T>
  static void store(T* p, Reg v, int n) {
    T part[width];
    store(part, v);
    std::memcpy(p, part, sizeof(T) * n);
  }

  // Past the cache; p is a multiple of width elements from a 64-byte boundary.
  static void stream(float* p, Reg v) { _mm256_stream_ps(p, v); }
  template <class T>
  static void stream(T* p, Reg v) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(v, p));
  }
  static void fence() { _mm_sfence(); }

  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }  // b where either is NaN
  static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }  // likewise
  static Reg abs(Reg a) { return _mm256_andnot_ps(set(-0.0f), a); }
  static Reg round(Reg a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // In two steps, so that results near the ends of the range neither overflow nor vanish on the way.
  static Reg scale_by_power_of_two(Reg a, Reg n) {
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return a * power_of_two(half) * power_of_two(_mm256_sub_epi32(whole, half));
  }
  // A bit for each lane in which a <= b.
  static uint32_t at_most(Reg a, Reg b) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ))); }
  static Reg where_negative(Reg test, Reg a, Reg b) {  // test < 0 ? a : b
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(test, _mm256_setzero_ps(), _CMP_LT_OQ));
  }
  static float sum(Reg a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
  }

 private:
  static __m256i lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Reg power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }

  static __m128i narrow(Reg v, BFloat16*) {  // to nearest even; a NaN stays one
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
  static __m128i narrow(Reg v, Half*) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

}  // namespace
}  // namespace rvae::cpu
