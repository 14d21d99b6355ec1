// A vector of kLanes floats through the compilers' vector extension, and the elementary functions the activations need.
// Included by files that are compiled for one instruction set (RVAE_LANES says how wide); everything is in an anonymous
// namespace and uses no library function, so that no copy of it can be shared with a file for another instruction set.
#pragma once

#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define RVAE_INLINE inline __attribute__((always_inline))

namespace {

constexpr int kLanes = RVAE_LANES;

typedef float vf __attribute__((vector_size(RVAE_LANES * 4)));
typedef int32_t vi __attribute__((vector_size(RVAE_LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(RVAE_LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(RVAE_LANES * 2)));
typedef float vf_unaligned __attribute__((vector_size(RVAE_LANES * 4), aligned(4), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(RVAE_LANES * 2), aligned(2), may_alias));

RVAE_INLINE vf splat(float x) {
  return x - vf{};
}

RVAE_INLINE vf widen(vh h) {
  return (vf)(__builtin_convertvector(h, vu) << 16);
}

// To bf16, nearest, ties to even; NaN stays NaN.
RVAE_INLINE vh narrow(vf x) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  const vu bits = (vu)x;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu kept = (vi)(x == x) ? rounded : (bits >> 16 | 0x40u);
  return __builtin_convertvector(kept, vh);
#endif
}

// How many lanes of a vector are inside the matrix: all of them, known when compiling, or the first n.
struct Full {};
struct Tail {
  int n;
};

template <class T>
RVAE_INLINE vf load(const T* p, Full);
template <>
RVAE_INLINE vf load(const float* p, Full) {
  return *reinterpret_cast<const vf_unaligned*>(p);
}
template <>
RVAE_INLINE vf load(const uint16_t* p, Full) {
  return widen(*reinterpret_cast<const vh_unaligned*>(p));
}
// Lanes outside read as zero.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
RVAE_INLINE __mmask16 mask(Tail tail) {
  return static_cast<__mmask16>((1u << tail.n) - 1u);
}
RVAE_INLINE vf load(const float* p, Tail tail) {
  return (vf)_mm512_maskz_loadu_ps(mask(tail), p);
}
RVAE_INLINE vf load(const uint16_t* p, Tail tail) {
  return widen((vh)_mm256_maskz_loadu_epi16(mask(tail), p));
}
RVAE_INLINE void store(float* p, vf x, Tail tail) {
  _mm512_mask_storeu_ps(p, mask(tail), (__m512)x);
}
RVAE_INLINE void store(uint16_t* p, vf x, Tail tail) {
  _mm256_mask_storeu_epi16(p, mask(tail), (__m256i)narrow(x));
}
// A whole vector, zero outside the matrix, for buffers that have the room.
RVAE_INLINE vf inside(vf x, Tail tail) {
  return (vf)_mm512_maskz_mov_ps(mask(tail), (__m512)x);
}
#else
RVAE_INLINE vf load(const float* p, Tail tail) {
  vf x{};
  for (int i = 0; i < tail.n; ++i) x[i] = p[i];
  return x;
}
RVAE_INLINE vf load(const uint16_t* p, Tail tail) {
  vh x{};
  for (int i = 0; i < tail.n; ++i) x[i] = p[i];
  return widen(x);
}
RVAE_INLINE void store(float* p, vf x, Tail tail) {
  for (int i = 0; i < tail.n; ++i) p[i] = x[i];
}
RVAE_INLINE void store(uint16_t* p, vf x, Tail tail) {
  const vh h = narrow(x);
  for (int i = 0; i < tail.n; ++i) p[i] = h[i];
}
// A whole vector, zero outside the matrix, for buffers that have the room.
RVAE_INLINE vf inside(vf x, Tail tail) {
  vf y{};
  for (int i = 0; i < tail.n; ++i) y[i] = x[i];
  return y;
}
#endif
RVAE_INLINE vf inside(vf x, Full) {
  return x;
}

RVAE_INLINE void store(float* p, vf x, Full) {
  *reinterpret_cast<vf_unaligned*>(p) = x;
}
RVAE_INLINE void store(uint16_t* p, vf x, Full) {
  *reinterpret_cast<vh_unaligned*>(p) = narrow(x);
}

// The vectors of a panel, one beside the other.
template <int N>
RVAE_INLINE void store_panel(float* p, const vf (&x)[N]) {
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) store(p + v * kLanes, x[v], Full{});
}
template <int N>
RVAE_INLINE void store_panel(uint16_t* p, const vf (&x)[N]) {
#if defined(__AVX512BF16__)
  static_assert(N == 2);
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]));
#else
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) store(p + v * kLanes, x[v], Full{});
#endif
}

// What a value becomes when it is stored as T.
template <class T>
RVAE_INLINE vf as_stored(vf x);
template <>
RVAE_INLINE vf as_stored<float>(vf x) {
  return x;
}
template <>
RVAE_INLINE vf as_stored<uint16_t>(vf x) {
  return widen(narrow(x));
}

// Whether a comparison holds in any lane.
RVAE_INLINE bool any(vi holds) {
  int32_t found = 0;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) found |= holds[i];
  return found != 0;
}

// The sum of all lanes, by halves.
RVAE_INLINE float total(vf x) {
  float lanes[kLanes];
  __builtin_memcpy(lanes, &x, sizeof(x));
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

template <class F>
RVAE_INLINE void for_columns(int64_t width, F f) {
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) f(c, Full{});
  if (c < width) f(c, Tail{static_cast<int>(width - c)});
}

// ------------------------------------------------------------------------------------------------ elementary functions

struct Exponential {
  vf scale;  // 2^n
  vf rest;   // exp(r) - 1, |r| <= ln 2 / 2
};

// exp(x) = scale * (1 + rest). Cephes' polynomial, relative error below 1e-7. Arguments are kept in the range of fp32.
RVAE_INLINE Exponential exponential(vf x) {
  x = x > 88.0f ? splat(88.0f) : x;
  x = x < -87.0f ? splat(-87.0f) : x;
  const vf shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer, kept in the low bits
  const vf n = shifted - 12582912.0f;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const vi exponent = (vi)shifted - 0x4b400000;
  return {(vf)((exponent + 127) << 23), p * r * r + r};
}

RVAE_INLINE vf exp(vf x) {
  const Exponential e = exponential(x);
  return e.scale * e.rest + e.scale;
}

RVAE_INLINE vf expm1(vf x) {
  const Exponential e = exponential(x);
  return e.scale * e.rest + (e.scale - 1.0f);
}

RVAE_INLINE vf tanh(vf x) {
  const vf magnitude = x < 0.0f ? -x : x;
  const vf t = expm1(magnitude + magnitude);
  const vf y = t / (t + 2.0f);
  return x < 0.0f ? -y : y;
}

RVAE_INLINE vf sigmoid(vf x) {
  return 1.0f / (1.0f + exp(-x));
}

// Rational approximation on [-4, 4] (beyond it erf is 1 in fp32), error a few units in the last place.
RVAE_INLINE vf erf(vf x) {
  x = x > 4.0f ? splat(4.0f) : x;
  x = x < -4.0f ? splat(-4.0f) : x;
  const vf s = x * x;
  vf p = s * -2.72614225801306e-10f + 2.77068142495902e-08f;
  p = p * s + -2.10102402082508e-06f;
  p = p * s + -5.69250639462346e-05f;
  p = p * s + -7.34990630326855e-04f;
  p = p * s + -2.95459980854025e-03f;
  p = p * s + -1.60960333262415e-02f;
  vf q = s * -1.45660718464996e-05f + -2.13374055278905e-04f;
  q = q * s + -1.68282697438203e-03f;
  q = q * s + -7.37332916720468e-03f;
  q = q * s + -1.42647390514189e-02f;
  return x * p / q;
}

}  // namespace
