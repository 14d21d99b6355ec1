// posterior_train: the posterior as one node of the autograd graph, for eager training; see posterior.h. It calls the ops
// through the dispatcher, so that who records ops (a dispatch mode) has these too, with the same bits.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "cpu/batched_gradients.h"
#include "cpu/posterior.h"

namespace rvae::cpu::posterior {

namespace {

using OptionalTensor = std::optional<at::Tensor>;

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Posterior run_forward(const at::Tensor& code, const at::Tensor& noise, double low, double high, bool keep) {
  using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&,
                                                                                         double, double, bool);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("rvae_fast::posterior", "").typed<Forward>();
  auto [mu, logvar, z, slope, spread] = op.call(code, noise, low, high, keep);
  return {mu, logvar, z, slope, spread};
}

at::Tensor run_backward(const variable_list& incoming, const at::Tensor& slope, const at::Tensor& spread, at::ScalarType dtype) {
  using Backward = at::Tensor(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const at::Tensor&,
                              const at::Tensor&, at::ScalarType);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("rvae_fast::posterior_backward", "").typed<Backward>();
  const auto given = [&](size_t i) { return incoming[i].defined() ? OptionalTensor(incoming[i]) : std::nullopt; };
  return op.call(given(0), given(1), given(2), slope, spread, dtype);
}

// Gradients that will be differentiated themselves: forward once more by PyTorch's ops, then backward with a graph.
at::Tensor differentiable(const variable_list& incoming, const at::Tensor& code, const at::Tensor& noise, double low, double high) {
  const at::Tensor source = code.view_as(code), wide = source.to(at::kFloat);
  const int64_t latent = noise.size(1);
  const at::Tensor mu = wide.narrow(1, 0, latent), raw = wide.narrow(1, latent, latent);
  const at::Tensor logvar = at::softplus(high - at::softplus(high - raw) - low) + low;
  const variable_list outputs{mu, logvar, mu + at::exp(logvar * 0.5) * noise};
  variable_list from, gradients;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!incoming[i].defined()) continue;
    from.push_back(outputs[i]);
    gradients.push_back(incoming[i]);
  }
  return torch::autograd::grad(from, {source}, gradients, /*retain_graph=*/true, /*create_graph=*/true)[0];
}

class Node : public torch::autograd::Function<Node> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& code, const at::Tensor& noise, double low, double high) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Posterior out = run_forward(code, noise, low, high, /*keep=*/true);
    ctx->save_for_backward({code, noise, out.slope, out.spread});
    ctx->saved_data["low"] = low;
    ctx->saved_data["high"] = high;
    ctx->set_materialize_grads(false);
    return {out.mu, out.logvar, out.z};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    variable_list result(4);
    if (!incoming[0].defined() && !incoming[1].defined() && !incoming[2].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const double low = ctx->saved_data.at("low").toDouble(), high = ctx->saved_data.at("high").toDouble();
    result[0] = one_by_one(incoming, [&](const variable_list& one) -> variable_list {
      if (at::GradMode::is_enabled()) return {differentiable(one, saved[0], saved[1], low, high)};
      const at::AutoDispatchBelowADInplaceOrView below;
      return {run_backward(one, saved[2], saved[3], saved[0].scalar_type())};
    })[0];
    return result;
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> sample(const at::Tensor& code, const at::Tensor& noise, double low, double high) {
  TORCH_CHECK_VALUE(!noise.requires_grad(), "posterior: noise must not require a gradient");
  if (code.requires_grad() && at::GradMode::is_enabled()) {
    variable_list out = Node::apply(code, noise, low, high);
    return {out[0], out[1], out[2]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  const Posterior out = run_forward(code, noise, low, high, /*keep=*/false);
  return {out.mu, out.logvar, out.z};
}

}  // namespace

TORCH_LIBRARY_IMPL(rvae_fast, CPU, m) {  // under inference_mode
  m.impl("posterior_train", sample);
}

TORCH_LIBRARY_IMPL(rvae_fast, AutogradCPU, m) {
  m.impl("posterior_train", sample);
}

}  // namespace rvae::cpu::posterior
