// Checks and registration of the plain stack's ops; schemas are in rvae_fast/ops/plain_stack_op.py.
#include "cpu/plain_stack.h"

#include <torch/library.h>

#include <algorithm>
#include <utility>

#include "cpu/stack_checks.h"

namespace rvae::cpu::stack {

namespace {

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

}  // namespace

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

Gradients plain_stack_gradients(const at::Tensor& gradient, const at::Tensor& x, Tensors weights, Tensors gammas, Tensors betas,
                                const at::Tensor& inner, const at::Tensor& statistics, std::string_view activation,
                                double negative_slope, bool batch_statistics, at::ScalarType dtype, const Needs& needs,
                                const Gradients* into) {
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
  TORCH_CHECK_VALUE(needs.weights.size() == weights.size() && needs.biases.size() == weights.size() &&
                        needs.norms.size() + 1 == weights.size(),
                    "plain_stack_backward: one flag a layer and one a norm are expected");
  const Inputs inputs{x.contiguous(), contiguous(weights), {}, contiguous(gammas), contiguous(betas), {}, {}, 0.0,
                      batch_statistics};
  const ForwardResult forward_result{{}, inner, {}, statistics};
  return backward(shape, inputs, forward_result, gradient.to(kept).contiguous(), needs, into);
}

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
      TORCH_CHECK_VALUE(running.dim() == 1 && running.size(0) <= statistics.size(2) && (running.stride(0) > 0 || running.size(0) < 2),
                        "update_running: a running average must have memory of its own for each column and be no wider than "
                        "the statistics");
      auto* values = running.data_ptr<float>();
      const float* own = batch + row * statistics.size(2);
      const int64_t stride = running.stride(0);
      for (int64_t c = 0; c < running.size(0); ++c) values[c * stride] = rest * values[c * stride] + weight * own[c];
      // As a kernel of torch's would: who remembers the version sees that the tensor was written.
      if (!running.is_inference()) running.unsafeGetTensorImpl()->bump_version();
    }
  }
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> plain_stack_backward(
    const at::Tensor& gradient, const at::Tensor& x, Tensors weights, Tensors gammas, Tensors betas, const at::Tensor& inner,
    const at::Tensor& statistics, std::string_view activation, double negative_slope, bool batch_statistics, at::ScalarType dtype,
    bool need_x, const c10::List<bool>& need_weights, const c10::List<bool>& need_biases, const c10::List<bool>& need_norms) {
  Gradients g = plain_stack_gradients(gradient, x, std::move(weights), std::move(gammas), std::move(betas), inner, statistics,
                                      activation, negative_slope, batch_statistics, dtype,
                                      {need_x, flags(need_weights), flags(need_biases), flags(need_norms)});
  return {g.x, g.weights, g.biases, g.gammas, g.betas};
}

}  // namespace

TORCH_LIBRARY_IMPL(rvae_fast, CPU, m) {
  m.impl("plain_stack", plain_stack);
  m.impl("plain_stack_backward", plain_stack_backward);
  m.impl("update_running", update_running);
}

}  // namespace rvae::cpu::stack
