// reconstruction_kld for any CPU, and for fp64 on all of them.
#include "vec_portable.h"

#include "reconstruction_kld_kernels.h"

namespace rvae::cpu::loss {
namespace {

using Set = FloatKernels<Vec>;

ErrorForwardFn forward(DType x, DType x_hat, Likelihood likelihood, bool weighted) {
  if (x == DType::Float64 && x_hat == DType::Float64) {
    return pick_error_forward<Vec64, double, double>(likelihood, weighted);
  }
  return Set::forward(x, x_hat, likelihood, weighted);
}

ErrorBackwardFn backward(DType x, DType x_hat, Likelihood likelihood, bool plain) {
  if (x == DType::Float64 && x_hat == DType::Float64) {
    return pick_error_backward<Vec64, double, double>(likelihood, plain);
  }
  return Set::backward(x, x_hat, likelihood, plain);
}

KldForwardFn kld_forward_for(DType dtype) {
  return dtype == DType::Float64 ? kld_forward<Vec64, double> : Set::kld_forward_for(dtype);
}

KldBackwardFn kld_backward_for(DType dtype) {
  return dtype == DType::Float64 ? kld_backward<Vec64, double> : Set::kld_backward_for(dtype);
}

}  // namespace

const Kernels portable_kernels = {forward, backward, kld_forward_for, kld_backward_for};

}  // namespace rvae::cpu::loss
