// The plain stack's ops as plain_stack.cpp registers them, for its autograd node.
#pragma once

#include <ATen/core/List.h>

#include <string_view>
#include <tuple>

#include "cpu/stack_checks.h"

namespace rvae::cpu::stack {

std::tuple<at::Tensor, at::Tensor, at::Tensor> plain_stack(const at::Tensor& x, Tensors weights, Tensors biases, Tensors gammas,
                                                           Tensors betas, Tensors running_means, Tensors running_vars,
                                                           std::string_view activation, double negative_slope, double eps,
                                                           bool batch_statistics, at::ScalarType dtype, bool keep);

// Gradients of all layers one after another; `inner` and `statistics` from plain_stack with keep.
Gradients plain_stack_gradients(const at::Tensor& gradient, const at::Tensor& x, Tensors weights, Tensors gammas, Tensors betas,
                                const at::Tensor& inner, const at::Tensor& statistics, std::string_view activation,
                                double negative_slope, bool batch_statistics, at::ScalarType dtype, const Needs& needs,
                                const Gradients* into = nullptr);

// running = (1 - momentum) * running + momentum * batch, layer by layer: a norm that is there twice sees each in turn.
void update_running(Tensors means, Tensors variances, const at::Tensor& statistics, at::ArrayRef<double> momentum);

}  // namespace rvae::cpu::stack
