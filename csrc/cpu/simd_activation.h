// The activations a residual unit can have, and their derivatives, on vectors (simd_vector.h).
#pragma once

#include "cpu/simd_vector.h"
#include "cpu/stack_kernels.h"

namespace {

using rvae::cpu::stack::Activation;

template <Activation A>
RVAE_INLINE vf activate(vf z, vf slope) {
  if constexpr (A == Activation::relu) return z < 0.0f ? vf{} : z;  // written so that NaN stays NaN
  if constexpr (A == Activation::leaky_relu) return z > 0.0f ? z : z * slope;
  if constexpr (A == Activation::elu) return z > 0.0f ? z : expm1(z);
  if constexpr (A == Activation::silu) return z * sigmoid(z);
  if constexpr (A == Activation::gelu) return z * (0.5f + 0.5f * erf(z * 0.70710678118654752f));
  if constexpr (A == Activation::tanh) return tanh(z);
  return z;
}

// gradient * act'(z)
template <Activation A>
RVAE_INLINE vf activate_backward(vf gradient, vf z, vf slope) {
  if constexpr (A == Activation::relu) return z > 0.0f ? gradient : vf{};
  if constexpr (A == Activation::leaky_relu) return z > 0.0f ? gradient : gradient * slope;
  if constexpr (A == Activation::elu) return z > 0.0f ? gradient : gradient * exp(z);
  if constexpr (A == Activation::silu) {
    const vf s = sigmoid(z);
    return gradient * (s * (1.0f + z * (1.0f - s)));
  }
  if constexpr (A == Activation::gelu) {
    const vf cdf = 0.5f + 0.5f * erf(z * 0.70710678118654752f);
    return gradient * (cdf + z * (0.39894228040143268f * exp(z * z * -0.5f)));
  }
  if constexpr (A == Activation::tanh) {
    const vf t = tanh(z);
    return gradient * (1.0f - t * t);
  }
  return gradient;
}

template <Activation A>
struct ActivationConstant {
  static constexpr Activation value = A;
};

// Calls f(ActivationConstant<A>{}) for the activation at hand.
template <class F>
RVAE_INLINE void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::identity: return f(ActivationConstant<Activation::identity>{});
    case Activation::relu: return f(ActivationConstant<Activation::relu>{});
    case Activation::leaky_relu: return f(ActivationConstant<Activation::leaky_relu>{});
    case Activation::elu: return f(ActivationConstant<Activation::elu>{});
    case Activation::silu: return f(ActivationConstant<Activation::silu>{});
    case Activation::gelu: return f(ActivationConstant<Activation::gelu>{});
    case Activation::tanh: return f(ActivationConstant<Activation::tanh>{});
  }
}

}  // namespace
