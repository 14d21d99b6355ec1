// The kernels of the posterior over a vector type V (vec_*.h). Include after one of these; everything here has internal linkage.
#pragma once

#include "posterior_kernels.h"

namespace rvae::cpu::posterior {
namespace {

// The log variance is low + softplus(v - low) with v = high - softplus(high - raw). In that form its last bits are lost to
// the numbers that are added and taken away again. Since softplus(t) = max(t, 0) + log(1 + exp(-|t|)), the same is
//   v = min(raw, high) - log(1 + exp(-|raw - high|)),   logvar = max(v, low) + log(1 + exp(-|v - low|)),
// and the two exponentials give the derivatives, sigmoid(high - raw) and sigmoid(v - low), as well.
// V::min and V::max return their second operand where one is NaN, so that NaN passes through.
template <class V, class T, bool Keep>
void forward(const Forward& args, int64_t begin, int64_t end) {
  using Reg = typename V::Reg;
  using M = Math<V>;
  constexpr int W = V::width;
  const Reg low = V::set(args.low), high = V::set(args.high), one = V::set(1.0f), half = V::set(0.5f);
  for (int64_t b = begin; b < end; ++b) {
    const T* means = static_cast<const T*>(args.code) + b * args.stride;
    const T* raws = means + args.latent;
    const int64_t row = b * args.latent;
    // n elements from l on, of type int in the last, partial vector and absent in the whole ones
    const auto step = [&](int64_t l, auto... n) {
      const Reg raw = V::load(raws + l, n..., float(n * 0)...), above = raw - high;
      const Reg e1 = M::exp(-V::abs(above));
      const Reg v = V::min(high, raw) - M::log1p_unit(e1), below = v - low;
      const Reg e2 = M::exp(-V::abs(below));
      const Reg logvar = V::max(low, v) + M::log1p_unit(e2);
      const Reg deviation = M::exp(half * logvar);
      const Reg mu = V::load(means + l, n..., float(n * 0)...);
      const Reg noise = V::load(args.noise + row + l, n..., float(n * 0)...);
      V::store(args.mu + row + l, mu, n...);
      V::store(args.logvar + row + l, logvar, n...);
      V::store(args.z + row + l, V::fma(deviation, noise, mu), n...);
      if constexpr (Keep) {
        const Reg share1 = V::where_negative(above, one, e1), share2 = V::where_negative(below, e2, one);
        V::store(args.slope + row + l, share1 * share2 / ((one + e1) * (one + e2)), n...);
        V::store(args.spread + row + l, half * deviation * noise, n...);
      }
    };
    int64_t l = 0;
    for (; l + W <= args.latent; l += W) step(l);
    if (l < args.latent) step(l, static_cast<int>(args.latent - l));
  }
}

template <class V, class T>
void backward(const Backward& args, int64_t begin, int64_t end) {
  using Reg = typename V::Reg;
  constexpr int W = V::width;
  for (int64_t b = begin; b < end; ++b) {
    T* of_means = static_cast<T*>(args.of_code) + 2 * b * args.latent;
    T* of_raws = of_means + args.latent;
    const int64_t row = b * args.latent;
    const auto step = [&](int64_t l, auto... n) {
      const auto load = [&](const float* p) { return V::load(p + row + l, n..., float(n * 0)...); };
      const auto load_or_zero = [&](const float* p) { return p == nullptr ? V::set(0) : load(p); };
      Reg of_logvar = load_or_zero(args.of_logvar), of_mu = load_or_zero(args.of_mu);
      if (args.of_z != nullptr) {
        const Reg of_z = load(args.of_z);
        of_logvar = V::fma(of_z, load(args.spread), of_logvar);
        of_mu = of_mu + of_z;
      }
      V::store(of_means + l, of_mu, n...);
      V::store(of_raws + l, of_logvar * load(args.slope), n...);
    };
    int64_t l = 0;
    for (; l + W <= args.latent; l += W) step(l);
    if (l < args.latent) step(l, static_cast<int>(args.latent - l));
  }
}

template <class V>
struct KernelsOver {
  static ForwardFn forward_for(DType code, bool keep) {
    if (code == DType::Float32) return keep ? forward<V, float, true> : forward<V, float, false>;
    return keep ? forward<V, BFloat16, true> : forward<V, BFloat16, false>;
  }
  static BackwardFn backward_for(DType code) {
    return code == DType::Float32 ? backward<V, float> : backward<V, BFloat16>;
  }
};

}  // namespace
}  // namespace rvae::cpu::posterior
