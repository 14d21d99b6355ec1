// Checks and registration of the residual stack's ops; schemas are in rvae_fast/ops/residual_stack.py.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "cpu/stack_pass.h"

namespace rvae::cpu::stack {

namespace {

using Tensors = std::vector<at::Tensor>;

Order parse_order(std::string_view order) {
  TORCH_CHECK_VALUE(order == "pre" || order == "post", "residual_stack: order must be 'pre' or 'post', got '", order, "'");
  return order == "pre" ? Order::pre : Order::post;
}

Activation parse_activation(std::string_view name) {
  constexpr std::string_view names[] = {"identity", "relu", "leaky_relu", "elu", "silu", "gelu", "tanh"};
  for (int i = 0; i < 7; ++i) {
    if (name == names[i]) return static_cast<Activation>(i);
  }
  TORCH_CHECK_VALUE(false, "residual_stack: activation is unknown: '", name, "'");
}

void check_list(const char* name, const Tensors& tensors, size_t layers, at::IntArrayRef shape, bool may_be_empty) {
  if (may_be_empty && tensors.empty()) return;
  TORCH_CHECK_VALUE(tensors.size() == layers, "residual_stack: ", name, " has ", tensors.size(), " tensors, expected ", layers);
  for (const auto& t : tensors) {
    TORCH_CHECK_VALUE(t.sizes() == shape, "residual_stack: ", name, " must have shape ", shape, ", got ", t.sizes());
    TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat && t.device().is_cpu(), "residual_stack: ", name,
                     " must be float32 on the CPU, got ", t.scalar_type(), " on ", t.device());
  }
}

Tensors contiguous(const Tensors& tensors) {
  Tensors result;
  result.reserve(tensors.size());
  for (const auto& t : tensors) result.push_back(t.contiguous());
  return result;
}

std::vector<bool> flags(const c10::List<bool>& list) {
  return {list.begin(), list.end()};
}

Shape make_shape(const at::Tensor& x, size_t layers, int64_t layers_per_unit, std::string_view order, std::string_view activation,
                 double slope, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16,
                   "residual_stack: dtype must be float32 or bfloat16 on the CPU, got ", dtype);
  const bool bf16 = dtype == at::kBFloat16;
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) > 0, "residual_stack: x must have shape [batch, features], got ", x.sizes());
  TORCH_CHECK_TYPE(x.device().is_cpu() && (x.scalar_type() == at::kFloat || (bf16 && x.scalar_type() == at::kBFloat16)),
                   "residual_stack: x must be float32 (or, for bf16 products, bfloat16) on the CPU, got ", x.scalar_type(), " on ",
                   x.device());
  TORCH_CHECK_VALUE(layers > 0 && layers_per_unit > 0 && layers % layers_per_unit == 0, "residual_stack: ", layers,
                    " layers are not whole units of ", layers_per_unit);
  TORCH_CHECK(!bf16 || has_bf16_products(), "residual_stack: this CPU has no bf16 products");
  Shape s;
  s.rows = x.size(0);
  s.width = x.size(1);
  s.layers = static_cast<int64_t>(layers);
  s.layers_per_unit = layers_per_unit;
  s.order = parse_order(order);
  s.activation = parse_activation(activation);
  s.slope = static_cast<float>(slope);
  s.stream = x.scalar_type() == at::kFloat ? Kind::f32 : Kind::bf16;
  s.compute = bf16 ? Kind::bf16 : Kind::f32;
  return s;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> residual_stack(
    const at::Tensor& x, Tensors weights, Tensors biases, Tensors gammas, Tensors betas, Tensors running_means,
    Tensors running_vars, int64_t layers_per_unit, std::string_view order, std::string_view activation, double negative_slope,
    double eps, bool batch_statistics, at::ScalarType dtype, bool keep) {
  const Shape shape = make_shape(x, weights.size(), layers_per_unit, order, activation, negative_slope, dtype);
  const std::vector<int64_t> column{shape.width}, square{shape.width, shape.width};
  check_list("weights", weights, weights.size(), square, false);
  check_list("biases", biases, weights.size(), column, true);
  check_list("norm_weights", gammas, weights.size(), column, true);
  check_list("norm_biases", betas, weights.size(), column, true);
  check_list("running_means", running_means, weights.size(), column, batch_statistics);
  check_list("running_vars", running_vars, weights.size(), column, batch_statistics);
  TORCH_CHECK_VALUE(shape.rows > (batch_statistics ? 1 : 0), "residual_stack: x must have ",
                    batch_statistics ? "more than one row for statistics of the batch" : "at least one row", ", got ", x.sizes());
  const Inputs inputs{x.contiguous(),    contiguous(weights), contiguous(biases),        contiguous(gammas),
                      contiguous(betas), contiguous(running_means), contiguous(running_vars), eps,
                      batch_statistics};
  ForwardResult result = forward(shape, inputs, keep);
  return {result.out, result.inner, result.stream, result.statistics};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> residual_stack_backward(
    const at::Tensor& gradient, const at::Tensor& x, Tensors weights, Tensors gammas, Tensors betas, const at::Tensor& inner,
    const at::Tensor& stream, const at::Tensor& statistics, int64_t layers_per_unit, std::string_view order,
    std::string_view activation, double negative_slope, bool batch_statistics, at::ScalarType dtype, bool need_x,
    const c10::List<bool>& need_weights, const c10::List<bool>& need_biases, const c10::List<bool>& need_norms) {
  const Shape shape = make_shape(x, weights.size(), layers_per_unit, order, activation, negative_slope, dtype);
  const std::vector<int64_t> column{shape.width}, square{shape.width, shape.width};
  check_list("weights", weights, weights.size(), square, false);
  check_list("norm_weights", gammas, weights.size(), column, true);
  check_list("norm_biases", betas, weights.size(), column, true);
  const auto kept = shape.compute == Kind::f32 ? at::kFloat : at::kBFloat16;
  TORCH_CHECK(inner.scalar_type() == kept && inner.numel() == shape.inner_count() * x.numel() && inner.is_contiguous() &&
                  stream.scalar_type() == x.scalar_type() && stream.numel() == (shape.units() - 1) * x.numel() &&
                  stream.is_contiguous() && statistics.scalar_type() == at::kFloat &&
                  statistics.numel() == shape.layers * 3 * shape.padded() && statistics.is_contiguous(),
              "residual_stack_backward: the kept tensors are not those of a forward pass with keep=True");
  TORCH_CHECK_VALUE(gradient.sizes() == x.sizes(), "residual_stack_backward: the gradient must have shape ", x.sizes(), ", got ",
                    gradient.sizes());
  TORCH_CHECK_VALUE(need_weights.size() == weights.size() && need_biases.size() == weights.size() &&
                        need_norms.size() == weights.size(),
                    "residual_stack_backward: one flag a layer is expected");
  const Inputs inputs{x.contiguous(), contiguous(weights), {}, contiguous(gammas), contiguous(betas), {}, {}, 0.0,
                      batch_statistics};
  const ForwardResult forward_result{{}, inner, stream, statistics};
  const Needs needs{need_x, flags(need_weights), flags(need_biases), flags(need_norms)};
  Gradients g = backward(shape, inputs, forward_result, gradient.to(x.scalar_type()).contiguous(), needs);
  return {g.x, g.weights, g.biases, g.gammas, g.betas};
}

}  // namespace

TORCH_LIBRARY_IMPL(rvae_fast, CPU, m) {
  m.impl("residual_stack", residual_stack);
  m.impl("residual_stack_backward", residual_stack_backward);
}

// Facts about this machine, for whoever chooses: "isa" of the elementwise kernels, whether there are bf16 products.
TORCH_LIBRARY_FRAGMENT(rvae_fast, m) {
  m.def("cpu_kernel_isa() -> str", []() { return std::string(kernels().isa); });
  m.def("cpu_has_bf16_products() -> bool", []() { return has_bf16_products(); });
}

}  // namespace rvae::cpu::stack
