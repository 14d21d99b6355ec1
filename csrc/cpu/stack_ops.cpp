// Checks and registration of the stacks' ops; schemas are in rvae_fast/ops/residual_stack_op.py and plain_stack_op.py.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>
#include <tuple>
#include <utility>

#include "cpu/stack_pass.h"

namespace rvae::cpu::stack {

namespace {

using Tensors = std::vector<at::Tensor>;

// `shape_of(i)` is what tensor i must have.
template <class F>
void check_shapes(const char* op, const char* name, const Tensors& tensors, size_t count, F shape_of) {
  TORCH_CHECK_VALUE(tensors.size() == count, op, ": ", name, " has ", tensors.size(), " tensors, expected ", count);
  for (size_t i = 0; i < count; ++i) {
    const at::Tensor& t = tensors[i];
    const std::vector<int64_t> shape = shape_of(i);
    TORCH_CHECK_VALUE(t.sizes() == at::IntArrayRef(shape), op, ": ", name, " must have shape ", at::IntArrayRef(shape), ", got ",
                      t.sizes());
    TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat && t.device().is_cpu(), op, ": ", name, " must be float32 on the CPU, got ",
                     t.scalar_type(), " on ", t.device());
  }
}

Order parse_order(std::string_view order) {
  TORCH_CHECK_VALUE(order == "pre" || order == "post", "residual_stack: order must be 'pre' or 'post', got '", order, "'");
  return order == "pre" ? Order::pre : Order::post;
}

Activation parse_activation(const char* op, std::string_view name) {
  constexpr std::string_view names[] = {"identity", "relu", "leaky_relu", "elu", "silu", "gelu", "tanh"};
  for (int i = 0; i < 7; ++i) {
    if (name == names[i]) return static_cast<Activation>(i);
  }
  TORCH_CHECK_VALUE(false, op, ": activation is unknown: '", name, "'");
}

void check_list(const char* name, const Tensors& tensors, size_t layers, at::IntArrayRef shape, bool may_be_empty) {
  if (may_be_empty && tensors.empty()) return;
  check_shapes("residual_stack", name, tensors, layers, [shape](size_t) { return shape.vec(); });
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

// What both stacks have; the layers' widths are still to be filled in.
Shape make_common(const char* op, const at::Tensor& x, std::string_view activation, double slope, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16, op, ": dtype must be float32 or bfloat16 on the CPU, got ", dtype);
  const bool bf16 = dtype == at::kBFloat16;
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) > 0, op, ": x must have shape [batch, features], got ", x.sizes());
  TORCH_CHECK_TYPE(x.device().is_cpu() && (x.scalar_type() == at::kFloat || (bf16 && x.scalar_type() == at::kBFloat16)), op,
                   ": x must be float32 (or, for bf16 products, bfloat16) on the CPU, got ", x.scalar_type(), " on ", x.device());
  TORCH_CHECK(!bf16 || has_bf16_products(), op, ": this CPU has no bf16 products");
  Shape s;
  s.rows = x.size(0);
  s.activation = parse_activation(op, activation);
  s.slope = static_cast<float>(slope);
  s.stream = x.scalar_type() == at::kFloat ? Kind::f32 : Kind::bf16;
  s.compute = bf16 ? Kind::bf16 : Kind::f32;
  return s;
}

void check_rows(const char* op, const at::Tensor& x, bool batch_statistics) {
  TORCH_CHECK_VALUE(x.size(0) > (batch_statistics ? 1 : 0), op, ": x must have ",
                    batch_statistics ? "more than one row for statistics of the batch" : "at least one row", ", got ", x.sizes());
}

// ------------------------------------------------------------------------------------------------------- residual stacks

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
  TORCH_CHECK(inner.scalar_type() == kept && inner.numel() == shape.inner_size() && inner.is_contiguous() &&
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
  const auto by_layer = [&shape](const at::Tensor& vectors) { return vectors.view({vectors.numel() / shape.width, shape.width}); };
  return {g.x, g.weights.view({g.weights.numel() / (shape.width * shape.width), shape.width, shape.width}), by_layer(g.biases),
          by_layer(g.gammas), by_layer(g.betas)};
}

// ---------------------------------------------------------------------------------------------------------- plain stacks

// Checks the weights, which say what the widths are.
Shape make_plain_shape(const at::Tensor& x, const Tensors& weights, std::string_view activation, double slope,
                       at::ScalarType dtype) {
  Shape s = make_common("plain_stack", x, activation, slope, dtype);
  TORCH_CHECK_VALUE(!weights.empty(), "plain_stack: weights must not be empty");
  s.layers = s.layers_per_unit = static_cast<int64_t>(weights.size());
  s.order = Order::plain;
  s.widths.push_back(x.size(1));
  for (const at::Tensor& w : weights) {
    TORCH_CHECK_VALUE(w.dim() == 2 && w.size(0) > 0 && w.size(1) == s.widths.back(), "plain_stack: a weight must have shape [out, ",
                      s.widths.back(), "], got ", w.sizes());
    s.widths.push_back(w.size(0));
  }
  s.width = *std::max_element(s.widths.begin(), s.widths.end());
  check_shapes("plain_stack", "weights", weights, weights.size(), [&weights](size_t i) { return weights[i].sizes().vec(); });
  return s;
}

// Vectors as wide as the outputs of the first `count` layers; there may be none at all.
void check_vectors(const char* name, const Tensors& tensors, const Shape& shape, int64_t count, bool may_be_empty) {
  if (may_be_empty && tensors.empty()) return;
  check_shapes("plain_stack", name, tensors, count, [&shape](size_t i) { return std::vector<int64_t>{shape.out(i)}; });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> plain_stack(const at::Tensor& x, Tensors weights, Tensors biases, Tensors gammas,
                                                           Tensors betas, Tensors running_means, Tensors running_vars,
                                                           std::string_view activation, double negative_slope, double eps,
                                                           bool batch_statistics, at::ScalarType dtype, bool keep) {
  const Shape shape = make_plain_shape(x, weights, activation, negative_slope, dtype);
  check_vectors("biases", biases, shape, shape.layers, true);
  check_vectors("norm_weights", gammas, shape, shape.norms(), true);
  check_vectors("norm_biases", betas, shape, shape.norms(), true);
  check_vectors("running_means", running_means, shape, shape.norms(), batch_statistics);
  check_vectors("running_vars", running_vars, shape, shape.norms(), batch_statistics);
  check_rows("plain_stack", x, batch_statistics);
  const Inputs inputs{x.contiguous(),    contiguous(weights), contiguous(biases),        contiguous(gammas),
                      contiguous(betas), contiguous(running_means), contiguous(running_vars), eps,
                      batch_statistics};
  ForwardResult result = forward(shape, inputs, keep);
  return {result.out, result.inner, result.statistics};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> plain_stack_backward(
    const at::Tensor& gradient, const at::Tensor& x, Tensors weights, Tensors gammas, Tensors betas, const at::Tensor& inner,
    const at::Tensor& statistics, std::string_view activation, double negative_slope, bool batch_statistics, at::ScalarType dtype,
    bool need_x, const c10::List<bool>& need_weights, const c10::List<bool>& need_biases, const c10::List<bool>& need_norms) {
  const Shape shape = make_plain_shape(x, weights, activation, negative_slope, dtype);
  check_vectors("norm_weights", gammas, shape, shape.norms(), true);
  check_vectors("norm_biases", betas, shape, shape.norms(), true);
  const auto kept = shape.compute == Kind::f32 ? at::kFloat : at::kBFloat16;
  TORCH_CHECK(inner.scalar_type() == kept && inner.numel() == shape.inner_size() && inner.is_contiguous() &&
                  statistics.scalar_type() == at::kFloat && statistics.numel() == shape.norms() * 3 * shape.padded() &&
                  statistics.is_contiguous(),
              "plain_stack_backward: the kept tensors are not those of a forward pass with keep=True");
  const std::vector<int64_t> out{shape.rows, shape.out(shape.layers - 1)};
  TORCH_CHECK_VALUE(gradient.sizes() == at::IntArrayRef(out), "plain_stack_backward: the gradient must have shape ",
                    at::IntArrayRef(out), ", got ", gradient.sizes());
  TORCH_CHECK_VALUE(need_weights.size() == weights.size() && need_biases.size() == weights.size() &&
                        need_norms.size() + 1 == weights.size(),
                    "plain_stack_backward: one flag a layer and one a norm are expected");
  const Inputs inputs{x.contiguous(), contiguous(weights), {}, contiguous(gammas), contiguous(betas), {}, {}, 0.0,
                      batch_statistics};
  const ForwardResult forward_result{{}, inner, {}, statistics};
  const Needs needs{need_x, flags(need_weights), flags(need_biases), flags(need_norms)};
  Gradients g = backward(shape, inputs, forward_result, gradient.to(kept).contiguous(), needs);
  return {g.x, g.weights, g.biases, g.gammas, g.betas};
}

// running = (1 - momentum) * running + momentum * batch, layer by layer: a norm that is there twice sees each in turn.
void update_running(Tensors means, Tensors variances, const at::Tensor& statistics, at::ArrayRef<double> momentum) {
  const size_t count = means.size();
  TORCH_CHECK_VALUE(variances.size() == count && momentum.size() == count && statistics.dim() == 3 &&
                        statistics.size(0) == static_cast<int64_t>(count) && statistics.size(1) == 3 &&
                        statistics.scalar_type() == at::kFloat && statistics.is_contiguous(),
                    "update_running: means, variances and momentum must have an entry for each of the statistics");
  for (size_t i = 0; i < count; ++i) {
    const float* batch = statistics.const_data_ptr<float>() + static_cast<int64_t>(i) * 3 * statistics.size(2);
    const auto weight = static_cast<float>(momentum[i]), rest = static_cast<float>(1.0 - momentum[i]);
    for (const auto& [running, row] : {std::pair{means[i], kMean}, std::pair{variances[i], kVariance}}) {
      TORCH_CHECK_VALUE(running.dim() == 1 && running.size(0) <= statistics.size(2) && running.is_contiguous(),
                        "update_running: a running average must be contiguous and no wider than the statistics");
      auto* values = running.data_ptr<float>();
      const float* own = batch + row * statistics.size(2);
      for (int64_t c = 0; c < running.size(0); ++c) values[c] = rest * values[c] + weight * own[c];
      // As a kernel of torch's would: who remembers the version sees that the tensor was written.
      if (!running.is_inference()) running.unsafeGetTensorImpl()->bump_version();
    }
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(rvae_fast, CPU, m) {
  m.impl("update_running", update_running);
  m.impl("residual_stack", residual_stack);
  m.impl("residual_stack_backward", residual_stack_backward);
  m.impl("plain_stack", plain_stack);
  m.impl("plain_stack_backward", plain_stack_backward);
}

// Facts about this machine, for whoever chooses: "isa" of the elementwise kernels, whether there are bf16 products.
TORCH_LIBRARY_FRAGMENT(rvae_fast, m) {
  m.def("cpu_kernel_isa() -> str", []() { return std::string(kernels().isa); });
  m.def("cpu_has_bf16_products() -> bool", []() { return has_bf16_products(); });
}

}  // namespace rvae::cpu::stack
