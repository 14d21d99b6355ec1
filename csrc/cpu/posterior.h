// The posterior of a variational model, from the encoder's output: mean, log variance inside (low, high), and a sample.
#pragma once

#include <ATen/core/Tensor.h>

namespace rvae::cpu::posterior {

// Each [batch, latent] fp32.
struct Posterior {
  at::Tensor mu, logvar, z;
  at::Tensor slope, spread;  // for the backward; empty unless kept
};

// code: [batch, 2 * latent] fp32 or bf16, the means and then the raw log variances; noise: [batch, latent] fp32.
Posterior posterior(const at::Tensor& code, const at::Tensor& noise, double low, double high, bool keep);

// The gradient of the code, in `dtype`, from those of z, mu and logvar, each [batch, latent] or undefined, which is zero.
at::Tensor posterior_gradient(const at::Tensor& of_z, const at::Tensor& of_mu, const at::Tensor& of_logvar,
                              const at::Tensor& slope, const at::Tensor& spread, at::ScalarType dtype);

}  // namespace rvae::cpu::posterior
