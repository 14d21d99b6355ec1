// What reconstruction_kld.cpp (checks, threads) and the kernels compiled for each instruction set agree on.
// Includes no torch header, so that the ISA files may include it.
#pragma once

#include <cstdint>

namespace rvae::cpu::loss {

enum class DType { Float32, BFloat16, Float16, Float64 };
enum class Likelihood { Squared, Absolute, Bernoulli };

// A matrix whose rows are contiguous.
struct Rows {
  const void* data = nullptr;
  int64_t stride = 0;  // elements from one row to the next
};

// A vector [batch]; stride 0 where all gradients are one number, as those of a .sum() or .mean() are.
struct Column {
  const void* data = nullptr;
  int64_t stride = 0;
};

// Scalars of the accumulation dtype (fp32; fp64 for fp64) are: weight, error, kld, the incoming gradients, weight_partial.

struct ErrorForward {
  Rows x, x_hat;
  const void* weight = nullptr;  // [features] or null
  int64_t features = 0;
  double scale = 1;       // 1, or 1 / features
  void* error = nullptr;  // [batch]
};

struct ErrorBackward {
  Rows x, x_hat;
  const void* weight = nullptr;
  int64_t features = 0;
  double scale = 1;
  Column grad;
  void* grad_x = nullptr;      // [batch, features] contiguous, in the dtype of x; null if not needed
  void* grad_x_hat = nullptr;  // likewise
  bool stream = false;         // write gradients past the cache
};

struct KldForward {
  Rows mu, logvar;
  int64_t latent = 0;
  void* kld = nullptr;  // [batch]
};

struct KldBackward {
  Rows mu, logvar;
  int64_t latent = 0;
  Column grad;
  void* grad_mu = nullptr;  // [batch, latent] contiguous; null if not needed
  void* grad_logvar = nullptr;
};

// Each works on the rows [begin, end). weight_partial [features], zeroed by the caller, takes these rows' share of the
// gradient of the weights; null if not needed.
using ErrorForwardFn = void (*)(const ErrorForward&, int64_t begin, int64_t end);
using ErrorBackwardFn = void (*)(const ErrorBackward&, int64_t begin, int64_t end, void* weight_partial);
using KldForwardFn = void (*)(const KldForward&, int64_t begin, int64_t end);
using KldBackwardFn = void (*)(const KldBackward&, int64_t begin, int64_t end);

struct Kernels {
  // Null for a pair of dtypes that has no kernel; the caller then converts. fp64 is in the portable set only.
  ErrorForwardFn (*error_forward)(DType x, DType x_hat, Likelihood, bool weighted);
  // plain: no weights, and no other gradient than that of x_hat.
  ErrorBackwardFn (*error_backward)(DType x, DType x_hat, Likelihood, bool plain);
  KldForwardFn (*kld_forward)(DType);
  KldBackwardFn (*kld_backward)(DType);
};

extern const Kernels portable_kernels, avx2_kernels, avx512_kernels;  // the last two where they were compiled

}  // namespace rvae::cpu::loss
