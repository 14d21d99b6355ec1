// Sixteen floats in an AVX-512 register, and their loads and stores in fp32, bf16 and fp16.
// Only for files that are compiled with AVX-512: everything here has internal linkage.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own header of these intrinsics warns wherever one is inlined (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include "vec_math.h"
#include "vec_types.h"

namespace rvae::cpu {
namespace {

struct Vec {
  using Scalar = float;
  using Reg = __m512;
  static constexpr int width = 16;
  static constexpr bool streams = true;

  static Reg set(float value) { return _mm512_set1_ps(value); }

  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg load(const BFloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p); }
  static Reg load(const Half* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p); }

  // The first n < width elements; the other lanes are `fill`.
  static Reg load(const float* p, int n, float fill) { return _mm512_mask_loadu_ps(set(fill), lanes(n), p); }
  template <class T>
  static Reg load(const T* p, int n, float fill) {
    return _mm512_mask_mov_ps(set(fill), lanes(n), widen(_mm256_maskz_loadu_epi16(lanes(n), p), p));
  }

  static void store(float* p, Reg v) { _mm512_storeu_ps(p, v); }
  static void store(BFloat16* p, Reg v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, p)); }
  static void store(Half* p, Reg v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, p)); }

  static void store(float* p, Reg v, int n) { _mm512_mask_storeu_ps(p, lanes(n), v); }
  template <class T>
  static void store(T* p, Reg v, int n) {
    _mm256_mask_storeu_epi16(p, lanes(n), narrow(v, p));
  }

  // Past the cache; p is a multiple of width elements from a 64-byte boundary.
  static void stream(float* p, Reg v) { _mm512_stream_ps(p, v); }
  template <class T>
  static void stream(T* p, Reg v) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(v, p));
  }
  static void fence() { _mm_sfence(); }

  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }  // b where either is NaN
  static Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }  // likewise
  static Reg abs(Reg a) { return _mm512_abs_ps(a); }
  static Reg round(Reg a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg scale_by_power_of_two(Reg a, Reg n) { return _mm512_scalef_ps(a, n); }
  // A bit for each lane in which a <= b.
  static uint32_t at_most(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
  static Reg where_negative(Reg test, Reg a, Reg b) {  // test < 0 ? a : b
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(test, _mm512_setzero_ps(), _CMP_LT_OQ), b, a);
  }
  static float sum(Reg a) { return _mm512_reduce_add_ps(a); }

 private:
  static __mmask16 lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

  static Reg widen(__m256i bits, const BFloat16*) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Reg widen(__m256i bits, const Half*) { return _mm512_cvtph_ps(bits); }

  static __m256i narrow(Reg v, BFloat16*) {  // to nearest even; a NaN stays one
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16));
  }
  static __m256i narrow(Reg v, Half*) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

}  // namespace
}  // namespace rvae::cpu
