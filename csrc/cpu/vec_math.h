// exp and log1p over the vector interface of vec_*.h, which include this file. Everything here has internal linkage.
#pragma once

namespace rvae::cpu {
namespace {

template <class V>
struct Math {
  using Reg = typename V::Reg;

  // e^x to about one unit in the last place; 0 and inf beyond the range, NaN for NaN.
  // Cephes' expf: x = n log 2 + r with |r| <= log(2)/2, a polynomial in r, then a shift of the exponent by n.
  static Reg exp(Reg x) {
    // With x as the second operand a NaN passes through min and max.
    x = V::min(V::set(89.0f), V::max(V::set(-104.0f), x));
    const Reg n = V::round(x * V::set(1.44269504088896341f));
    Reg r = V::fma(n, V::set(-0.693359375f), x);
    r = V::fma(n, V::set(2.12194440e-4f), r);
    Reg p = V::fma(V::set(1.9875691500e-4f), r, V::set(1.3981999507e-3f));
    p = V::fma(p, r, V::set(8.3334519073e-3f));
    p = V::fma(p, r, V::set(4.1665795894e-2f));
    p = V::fma(p, r, V::set(1.6666665459e-1f));
    p = V::fma(p, r, V::set(5.0000001201e-1f));
    p = V::fma(p, r * r, r);
    return V::scale_by_power_of_two(p + V::set(1.0f), n);
  }

  // log(1 + e) for 0 <= e <= 1, to about one unit in the last place: 2 artanh(s) with s = e / (2 + e) <= 1/3, and
  // artanh(s) / s by a polynomial in s^2 (Chebyshev fit on [0, 1/9], error 4e-9).
  static Reg log1p_unit(Reg e) {
    const Reg s = e / (V::set(2.0f) + e);
    const Reg t = s * s;
    Reg p = V::fma(V::set(0.1408732831f), t, V::set(0.1398070902f));
    p = V::fma(p, t, V::set(0.2001242638f));
    p = V::fma(p, t, V::set(0.3333315849f));
    const Reg twice = s + s;
    return V::fma(twice * t, p, twice);
  }
};

}  // namespace
}  // namespace rvae::cpu
