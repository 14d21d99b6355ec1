// The vector interface without intrinsics: four floats by the compiler's vector extension (SSE2 on x86-64, NEON on Arm), and
// one double for fp64. Everything here has internal linkage.
#pragma once

#include <cmath>

#include "vec_math.h"
#include "vec_types.h"

namespace rvae::cpu {
namespace {

inline float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline float widen(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  float result;
  if (magnitude >= 0x7c00u) {  // inf, NaN
    const uint32_t bits = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
    std::memcpy(&result, &bits, sizeof(result));
  } else {
    // Read as if the exponent were an fp32 one, then mend its bias by a product: exact, subnormals included.
    const uint32_t bits = magnitude << 13;
    std::memcpy(&result, &bits, sizeof(result));
    result *= 0x1p112f;
    uint32_t scaled;
    std::memcpy(&scaled, &result, sizeof(scaled));
    scaled |= sign;
    std::memcpy(&result, &scaled, sizeof(result));
  }
  return result;
}

inline BFloat16 narrow(float value, const BFloat16*) {  // to nearest even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

inline Half narrow(float value, const Half*) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // from halfway past the largest, 65504
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 puts the rounded mantissa in the low bits
    float shifted;
    std::memcpy(&shifted, &magnitude, sizeof(shifted));
    shifted += 0.5f;
    uint32_t low;
    std::memcpy(&low, &shifted, sizeof(low));
    return {static_cast<uint16_t>(sign | (low - 0x3f000000u))};
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13))};
}

struct Vec {
  using Scalar = float;
  typedef float Reg __attribute__((vector_size(16)));
  typedef int32_t Bits __attribute__((vector_size(16)));
  static constexpr int width = 4;
  static constexpr bool streams = false;

  static Reg set(float value) { return Reg{value, value, value, value}; }

  static Reg load(const float* p) {
    Reg v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  template <class T>
  static Reg load(const T* p) {
    return Reg{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
  }

  // The first n < width elements; the other lanes are `fill`.
  template <class T>
  static Reg load(const T* p, int n, float fill) {
    T part[width] = {};
    std::memcpy(part, p, sizeof(T) * n);
    return lanes(n) ? load(part) : set(fill);
  }

  static void store(float* p, Reg v) { std::memcpy(p, &v, sizeof(v)); }
  template <class T>
  static void store(T* p, Reg v) {
    for (int i = 0; i < width; ++i) p[i] = narrow(v[i], p);
  }
  template <class T>
  static void store(T* p, Reg v, int n) {
    T part[width];
    store(part, v);
    std::memcpy(p, part, sizeof(T) * n);
  }

  template <class T>
  static void stream(T* p, Reg v) {
    store(p, v);
  }
  static void fence() {}

  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }  // b where either is NaN
  static Reg min(Reg a, Reg b) { return a < b ? a : b; }  // likewise
  static Reg abs(Reg a) { return reinterpret(reinterpret(a) & 0x7fffffff); }
  static Reg round(Reg a) {  // for |a| < 2^22, which is all that exp asks for: the sum has no room for a fraction
    const Reg shift = set(0x1.8p23f);
    return (a + shift) - shift;
  }
  // In two steps, so that results near the ends of the range neither overflow nor vanish on the way.
  static Reg scale_by_power_of_two(Reg a, Reg n) {
    const Bits whole = __builtin_convertvector(n, Bits), half = whole >> 1;
    return a * reinterpret((half + 127) << 23) * reinterpret((whole - half + 127) << 23);
  }
  // A bit for each lane in which a <= b.
  static uint32_t at_most(Reg a, Reg b) {
    const Bits bits = (a <= b) & Bits{1, 2, 4, 8};
    return static_cast<uint32_t>((bits[0] | bits[1]) | (bits[2] | bits[3]));
  }
  static Reg where_negative(Reg test, Reg a, Reg b) { return test < set(0.0f) ? a : b; }  // test < 0 ? a : b
  static float sum(Reg a) { return (a[0] + a[2]) + (a[1] + a[3]); }

 private:
  static Bits lanes(int n) { return Bits{0, 1, 2, 3} < Bits{n, n, n, n}; }
  static Reg reinterpret(Bits v) { return (Reg)v; }
  static Bits reinterpret(Reg v) { return (Bits)v; }
};

// One double: fp64 is for checking, not for speed.
struct Vec64 {
  using Scalar = double;
  using Reg = double;
  static constexpr int width = 1;
  static constexpr bool streams = false;

  static Reg set(double value) { return value; }
  static Reg load(const double* p) { return *p; }
  static Reg load(const double*, int, double fill) { return fill; }
  static void store(double* p, Reg v) { *p = v; }
  static void store(double*, Reg, int) {}
  static void stream(double* p, Reg v) { *p = v; }
  static void fence() {}
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }
  static Reg abs(Reg a) { return std::fabs(a); }
  static Reg where_negative(Reg test, Reg a, Reg b) { return test < 0 ? a : b; }
  static double sum(Reg a) { return a; }
};

template <>
struct Math<Vec64> {
  static double exp(double x) { return std::exp(x); }
  static double log1p_unit(double e) { return std::log1p(e); }
};

}  // namespace
}  // namespace rvae::cpu
