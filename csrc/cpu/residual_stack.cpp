// Checks and registration of the residual stack's ops; schemas are in rvae_fast/ops/residual_stack_op.py.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>
#include <utility>

#include "cpu/residual_stack.h"

namespace rvae::cpu::stack {

namespace {

Order parse_order(std::string_view order) {
  TORCH_CHECK_VALUE(order == "pre" || order == "post", "residual_stack: order must be 'pre' or 'post', got '", order, "'");
  return order == "pre" ? Order::pre : Order::post;
}

void check_list(const char* name, const Tensors& tensors, size_t layers, at::IntArrayRef shape, bool may_be_empty) {
  if (may_be_empty && tensors.empty()) return;
  check_shapes("residual_stack", name, tensors, layers, [shape](size_t) { return shape.vec(); });
}

Shape make_shape(const at::Tensor& x, size_t layers, int64_t layers_per_unit, std::string_view order, std::string_view activation,
                 double slope, at::ScalarType dtype) {
  Shape s = make_common("residual_stack", x, activation, slope, dtype);
  TORCH_CHECK_VALUE(layers > 0 && layers_per_unit > 0 && layers % layers_per_unit == 0, "residual_stack: ", layers,
                    " layers are not whole units of ", layers_per_unit);
  s.width = x.size(1);
  s.layers = static_cast<int64_t>(layers);
  s.layers_per_unit = layers_per_unit;
  s.widths.assign(layers + 1, s.width);
  s.order = parse_order(order);
  return s;
}

}  // namespace

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
  check_rows("residual_stack", x, batch_statistics);
  const Inputs inputs{x.contiguous(),    contiguous(weights), contiguous(biases),        contiguous(gammas),
                      contiguous(betas), contiguous(running_means), contiguous(running_vars), eps,
                      batch_statistics};
  ForwardResult result = forward(shape, inputs, keep);
  return {result.out, result.inner, result.stream, result.statistics};
}

Gradients residual_stack_gradients(const at::Tensor& gradient, const at::Tensor& x, Tensors weights, Tensors gammas, Tensors betas,
                                   const at::Tensor& inner, const at::Tensor& stream, const at::Tensor& statistics,
                                   int64_t layers_per_unit, std::string_view order, std::string_view activation,
                                   double negative_slope, bool batch_statistics, at::ScalarType dtype, const Needs& needs,
                                   const Gradients* into) {
  const Shape shape = make_shape(x, weights.size(), layers_per_unit, order, activation, negative_slope, dtype);
  const std::vector<int64_t> column{shape.width}, square{shape.width, shape.width};
  check_list("weights", weights, weights.size(), square, false);
  check_list("norm_weights", gammas, weights.size(), column, true);
  check_list("norm_biases", betas, weights.size(), column, true);
  const auto kept = shape.compute == Kind::f32 ? at::kFloat : at::kBFloat16;
  TORCH_CHECK(inner.scalar_type() == kept && inner.numel() == shape.inner_size() && inner.is_contiguous() &&
                  stream.scalar_type() == x.scalar_type() && stream.numel() == (shape.units() - 1) * x.numel() &&
                  stream.is_contiguous() && statistics.scalar_type() == at::kFloat &&
                  statistics.numel() == shape.layers * 3 * shape.padded() && statistics.is_contiguous(),
              "residual_stack_backward: the kept tensors are not those of a forward pass with keep=True");
  TORCH_CHECK_VALUE(gradient.sizes() == x.sizes(), "residual_stack_backward: the gradient must have shape ", x.sizes(), ", got ",
                    gradient.sizes());
  TORCH_CHECK_VALUE(needs.weights.size() == weights.size() && needs.biases.size() == weights.size() &&
                        needs.norms.size() == weights.size(),
                    "residual_stack_backward: one flag a layer is expected");
  const Inputs inputs{x.contiguous(), contiguous(weights), {}, contiguous(gammas), contiguous(betas), {}, {}, 0.0,
                      batch_statistics};
  const ForwardResult forward_result{{}, inner, stream, statistics};
  return backward(shape, inputs, forward_result, gradient.to(x.scalar_type()).contiguous(), needs, into);
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> residual_stack_backward(
    const at::Tensor& gradient, const at::Tensor& x, Tensors weights, Tensors gammas, Tensors betas, const at::Tensor& inner,
    const at::Tensor& stream, const at::Tensor& statistics, int64_t layers_per_unit, std::string_view order,
    std::string_view activation, double negative_slope, bool batch_statistics, at::ScalarType dtype, bool need_x,
    const c10::List<bool>& need_weights, const c10::List<bool>& need_biases, const c10::List<bool>& need_norms) {
  const Gradients g = residual_stack_gradients(gradient, x, std::move(weights), std::move(gammas), std::move(betas), inner, stream,
                                               statistics, layers_per_unit, order, activation, negative_slope, batch_statistics,
                                               dtype, {need_x, flags(need_weights), flags(need_biases), flags(need_norms)});
  const int64_t width = x.size(1);
  const auto by_layer = [width](const at::Tensor& vectors) { return vectors.view({vectors.numel() / width, width}); };
  return {g.x, g.weights.view({g.weights.numel() / (width * width), width, width}), by_layer(g.biases), by_layer(g.gammas),
          by_layer(g.betas)};
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
