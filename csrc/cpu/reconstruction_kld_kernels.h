// The kernels of reconstruction_kld over a vector type V (vec_*.h). A row is read once, and its sums stay in registers.
// Include after one of vec_*.h; everything here has internal linkage.
#pragma once

#include "reconstruction_kld.h"

namespace rvae::cpu::loss {
namespace {

template <class T>
const T* row(const Rows& rows, int64_t index) {
  return static_cast<const T*>(rows.data) + index * rows.stride;
}

template <class S>
S at(const Column& column, int64_t index) {
  return static_cast<const S*>(column.data)[index * column.stride];
}

// The hardware's own prefetchers stop at the end of a page; touching a line this far ahead every few lines wakes them there
// in time, and keeps the forward's reads going. Asking for every line costs 10 % where the inputs are in the last-level cache
// already, as does asking into the first-level cache; as far ahead for 16-bit inputs as for fp32 costs them 30 % from memory.
// (The backward, which writes as much as half of what it reads, gained nothing from it.)
template <class T>
void prefetch(const T* p) {
  constexpr int64_t bytes = sizeof(T) == 2 ? 2048 : 8192;
  __builtin_prefetch(reinterpret_cast<const char*>(p) + bytes, 0, 2);
}

// --- the error of one feature, and its slopes ---

template <class V, Likelihood L>
struct Term {
  using Reg = typename V::Reg;
  using S = typename V::Scalar;

  static constexpr S padding = L == Likelihood::Bernoulli ? -1e4 : 0;  // an x_hat whose error against x = 0 is 0

  static Reg value(Reg x, Reg x_hat) {
    if constexpr (L == Likelihood::Squared) {
      const Reg d = x_hat - x;
      return d * d;
    } else if constexpr (L == Likelihood::Absolute) {
      return V::abs(x_hat - x);
    } else {
      // softplus(h) - x h without cancellation: ((h < 0 ? 0 : 1) - x) h + log(1 + exp(-|h|))
      const Reg weight = V::where_negative(x_hat, V::set(0), V::set(1)) - x;
      return V::fma(weight, x_hat, Math<V>::log1p_unit(Math<V>::exp(-V::abs(x_hat))));
    }
  }

  static Reg slope_x_hat(Reg x, Reg x_hat) {
    if constexpr (L == Likelihood::Squared) {
      const Reg d = x_hat - x;
      return d + d;
    } else if constexpr (L == Likelihood::Absolute) {
      const Reg d = x_hat - x;
      return V::where_negative(d, V::set(-1), V::where_negative(-d, V::set(1), V::set(0)));
    } else {
      const Reg e = Math<V>::exp(-V::abs(x_hat));
      return V::where_negative(x_hat, e, V::set(1)) / (V::set(1) + e) - x;
    }
  }

  static Reg slope_x(Reg x_hat, Reg slope_of_x_hat) {
    return L == Likelihood::Bernoulli ? -x_hat : -slope_of_x_hat;
  }
};

// --- error ---

template <class V, Likelihood L, class X, class H, bool Weighted>
void error_forward(const ErrorForward& args, int64_t begin, int64_t end) {
  using Reg = typename V::Reg;
  using S = typename V::Scalar;
  constexpr int W = V::width, kUnroll = 4;
  const S* weight = static_cast<const S*>(args.weight);
  const int64_t features = args.features;
  for (int64_t b = begin; b < end; ++b) {
    const X* x = row<X>(args.x, b);
    const H* x_hat = row<H>(args.x_hat, b);
    const auto term = [&](int64_t f) {
      const Reg value = Term<V, L>::value(V::load(x + f), V::load(x_hat + f));
      return Weighted ? value * V::load(weight + f) : value;
    };
    Reg sums[kUnroll] = {V::set(0), V::set(0), V::set(0), V::set(0)};
    int64_t f = 0;
    for (; f + kUnroll * W <= features; f += kUnroll * W) {
      prefetch(x + f);
      prefetch(x_hat + f);
      for (int u = 0; u < kUnroll; ++u) sums[u] = sums[u] + term(f + u * W);
    }
    for (; f + W <= features; f += W) sums[0] = sums[0] + term(f);
    if (f < features) {
      const int n = static_cast<int>(features - f);
      const Reg value = Term<V, L>::value(V::load(x + f, n, 0), V::load(x_hat + f, n, Term<V, L>::padding));
      sums[1] = sums[1] + (Weighted ? value * V::load(weight + f, n, 0) : value);
    }
    const S sum = V::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    static_cast<S*>(args.error)[b] = sum * static_cast<S>(args.scale);
  }
}

template <class V, class T>
bool may_stream(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (V::width * sizeof(T)) == 0;
}

// The common case: a fixed target without weights, and the gradient of x_hat alone.
template <class V, Likelihood L, class X, class H>
void error_backward_plain(const ErrorBackward& args, int64_t begin, int64_t end, void*) {
  using Reg = typename V::Reg;
  using S = typename V::Scalar;
  constexpr int W = V::width;
  const int64_t features = args.features;
  for (int64_t b = begin; b < end; ++b) {
    const X* x = row<X>(args.x, b);
    const H* x_hat = row<H>(args.x_hat, b);
    H* out = static_cast<H*>(args.grad_x_hat) + b * features;
    const Reg grad = V::set(at<S>(args.grad, b) * static_cast<S>(args.scale));
    const auto slope = [&](int64_t f) { return grad * Term<V, L>::slope_x_hat(V::load(x + f), V::load(x_hat + f)); };
    int64_t f = 0;
    if (V::streams && args.stream && may_stream<V>(out)) {
      for (; f + W <= features; f += W) V::stream(out + f, slope(f));
    } else {
      for (; f + W <= features; f += W) V::store(out + f, slope(f));
    }
    if (f < features) {
      const int n = static_cast<int>(features - f);
      V::store(out + f, grad * Term<V, L>::slope_x_hat(V::load(x + f, n, 0), V::load(x_hat + f, n, 0)), n);
    }
  }
  V::fence();
}

// Any of the gradients of x, x_hat and the weights, with weights or without.
template <class V, Likelihood L, class X, class H>
void error_backward(const ErrorBackward& args, int64_t begin, int64_t end, void* weight_partial) {
  using Reg = typename V::Reg;
  using S = typename V::Scalar;
  constexpr int W = V::width;
  const S* weight = static_cast<const S*>(args.weight);
  S* partial = static_cast<S*>(weight_partial);
  const int64_t features = args.features;
  for (int64_t b = begin; b < end; ++b) {
    const X* x = row<X>(args.x, b);
    const H* x_hat = row<H>(args.x_hat, b);
    X* grad_x = args.grad_x ? static_cast<X*>(args.grad_x) + b * features : nullptr;
    H* grad_x_hat = args.grad_x_hat ? static_cast<H*>(args.grad_x_hat) + b * features : nullptr;
    const Reg grad = V::set(at<S>(args.grad, b) * static_cast<S>(args.scale));
    // n elements from f on, of type int in the last, partial vector and absent in the whole ones
    const auto step = [&](int64_t f, auto... n) {
      const Reg xs = V::load(x + f, n..., S(n * 0)...), hs = V::load(x_hat + f, n..., S(n * 0)...);
      if (grad_x || grad_x_hat) {
        const Reg scaled = weight ? grad * V::load(weight + f, n..., S(n * 0)...) : grad;
        const Reg slope = Term<V, L>::slope_x_hat(xs, hs);
        if (grad_x) V::store(grad_x + f, scaled * Term<V, L>::slope_x(hs, slope), n...);
        if (grad_x_hat) V::store(grad_x_hat + f, scaled * slope, n...);
      }
      if (partial) {
        const Reg sum = V::fma(grad, Term<V, L>::value(xs, hs), V::load(partial + f, n..., S(n * 0)...));
        V::store(partial + f, sum, n...);
      }
    };
    int64_t f = 0;
    for (; f + W <= features; f += W) step(f);
    if (f < features) step(f, static_cast<int>(features - f));
  }
}

// --- KL divergence ---

template <class V, class T>
void kld_forward(const KldForward& args, int64_t begin, int64_t end) {
  using Reg = typename V::Reg;
  using S = typename V::Scalar;
  constexpr int W = V::width;
  const auto term = [](Reg mu, Reg logvar) { return V::fma(mu, mu, (Math<V>::exp(logvar) - V::set(1)) - logvar); };
  for (int64_t b = begin; b < end; ++b) {
    const T* mu = row<T>(args.mu, b);
    const T* logvar = row<T>(args.logvar, b);
    Reg sum = V::set(0);
    int64_t l = 0;
    for (; l + W <= args.latent; l += W) sum = sum + term(V::load(mu + l), V::load(logvar + l));
    if (l < args.latent) {
      const int n = static_cast<int>(args.latent - l);
      sum = sum + term(V::load(mu + l, n, 0), V::load(logvar + l, n, 0));
    }
    static_cast<S*>(args.kld)[b] = S(0.5) * V::sum(sum);
  }
}

template <class V, class T>
void kld_backward(const KldBackward& args, int64_t begin, int64_t end) {
  using Reg = typename V::Reg;
  using S = typename V::Scalar;
  constexpr int W = V::width;
  for (int64_t b = begin; b < end; ++b) {
    const S grad = at<S>(args.grad, b);
    const auto step = [&](int64_t l, auto... n) {
      if (args.grad_mu) {
        const Reg mu = V::load(row<T>(args.mu, b) + l, n..., S(n * 0)...);
        V::store(static_cast<T*>(args.grad_mu) + b * args.latent + l, V::set(grad) * mu, n...);
      }
      if (args.grad_logvar) {
        const Reg logvar = V::load(row<T>(args.logvar, b) + l, n..., S(n * 0)...);
        const Reg slope = Math<V>::exp(logvar) - V::set(1);
        V::store(static_cast<T*>(args.grad_logvar) + b * args.latent + l, V::set(S(0.5) * grad) * slope, n...);
      }
    };
    int64_t l = 0;
    for (; l + W <= args.latent; l += W) step(l);
    if (l < args.latent) step(l, static_cast<int>(args.latent - l));
  }
}

// --- choice by dtype and likelihood ---

template <class V, class X, class H>
ErrorForwardFn pick_error_forward(Likelihood likelihood, bool weighted) {
  using L = Likelihood;
  switch (likelihood) {
    case L::Squared:
      return weighted ? error_forward<V, L::Squared, X, H, true> : error_forward<V, L::Squared, X, H, false>;
    case L::Absolute:
      return weighted ? error_forward<V, L::Absolute, X, H, true> : error_forward<V, L::Absolute, X, H, false>;
    case L::Bernoulli:
      return weighted ? error_forward<V, L::Bernoulli, X, H, true> : error_forward<V, L::Bernoulli, X, H, false>;
  }
  return nullptr;
}

template <class V, class X, class H>
ErrorBackwardFn pick_error_backward(Likelihood likelihood, bool plain) {
  using L = Likelihood;
  switch (likelihood) {
    case L::Squared:
      return plain ? error_backward_plain<V, L::Squared, X, H> : error_backward<V, L::Squared, X, H>;
    case L::Absolute:
      return plain ? error_backward_plain<V, L::Absolute, X, H> : error_backward<V, L::Absolute, X, H>;
    case L::Bernoulli:
      return plain ? error_backward_plain<V, L::Bernoulli, X, H> : error_backward<V, L::Bernoulli, X, H>;
  }
  return nullptr;
}

// Calls action(X{}, H{}) for the pairs of element types that have a kernel: equal ones, and fp32 with a 16-bit one.
template <class Fn, class Action>
Fn for_pair(DType x, DType x_hat, Action action) {
  if (x == DType::Float32 && x_hat == DType::Float32) return action(float{}, float{});
  if (x == DType::BFloat16 && x_hat == DType::BFloat16) return action(BFloat16{}, BFloat16{});
  if (x == DType::Float16 && x_hat == DType::Float16) return action(Half{}, Half{});
  if (x == DType::Float32 && x_hat == DType::BFloat16) return action(float{}, BFloat16{});
  if (x == DType::Float32 && x_hat == DType::Float16) return action(float{}, Half{});
  return nullptr;
}

template <class Fn, class Action>
Fn for_one(DType dtype, Action action) {
  switch (dtype) {
    case DType::Float32:
      return action(float{});
    case DType::BFloat16:
      return action(BFloat16{});
    case DType::Float16:
      return action(Half{});
    default:
      return nullptr;
  }
}

// The kernels over a vector of floats.
template <class V>
struct FloatKernels {
  static ErrorForwardFn forward(DType x, DType x_hat, Likelihood likelihood, bool weighted) {
    return for_pair<ErrorForwardFn>(x, x_hat, [=](auto a, auto b) {
      return pick_error_forward<V, decltype(a), decltype(b)>(likelihood, weighted);
    });
  }
  static ErrorBackwardFn backward(DType x, DType x_hat, Likelihood likelihood, bool plain) {
    return for_pair<ErrorBackwardFn>(x, x_hat, [=](auto a, auto b) {
      return pick_error_backward<V, decltype(a), decltype(b)>(likelihood, plain);
    });
  }
  static KldForwardFn kld_forward_for(DType dtype) {
    return for_one<KldForwardFn>(dtype, [](auto a) -> KldForwardFn { return kld_forward<V, decltype(a)>; });
  }
  static KldBackwardFn kld_backward_for(DType dtype) {
    return for_one<KldBackwardFn>(dtype, [](auto a) -> KldBackwardFn { return kld_backward<V, decltype(a)>; });
  }
};

}  // namespace
}  // namespace rvae::cpu::loss
