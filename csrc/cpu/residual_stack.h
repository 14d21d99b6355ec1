// The residual stack's ops as residual_stack.cpp registers them, for its autograd node.
#pragma once

#include <string_view>
#include <tuple>

#include "cpu/stack_checks.h"

namespace rvae::cpu::stack {

// out, inner, stream, statistics; what they are is said in rvae_fast/ops/residual_stack_op.py.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> residual_stack(
    const at::Tensor& x, Tensors weights, Tensors biases, Tensors gammas, Tensors betas, Tensors running_means,
    Tensors running_vars, int64_t layers_per_unit, std::string_view order, std::string_view activation, double negative_slope,
    double eps, bool batch_statistics, at::ScalarType dtype, bool keep);

// Gradients of all layers one after another; `inner`, `stream` and `statistics` from residual_stack with keep.
Gradients residual_stack_gradients(const at::Tensor& gradient, const at::Tensor& x, Tensors weights, Tensors gammas, Tensors betas,
                                   const at::Tensor& inner, const at::Tensor& stream, const at::Tensor& statistics,
                                   int64_t layers_per_unit, std::string_view order, std::string_view activation,
                                   double negative_slope, bool batch_statistics, at::ScalarType dtype, const Needs& needs,
                                   const Gradients* into = nullptr);

}  // namespace rvae::cpu::stack
