// posterior_train: the posterior as one node of the autograd graph, for eager training; see posterior.h.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

#include "cpu/posterior.h"

namespace rvae::cpu::posterior {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

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
    const Posterior out = posterior(code, noise, low, high, /*keep=*/true);
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
    if (at::GradMode::is_enabled()) {
      const auto& data = ctx->saved_data;
      result[0] = differentiable(incoming, saved[0], saved[1], data.at("low").toDouble(), data.at("high").toDouble());
    } else {
      const at::AutoDispatchBelowADInplaceOrView below;
      result[0] = posterior_gradient(incoming[2], incoming[0], incoming[1], saved[2], saved[3], saved[0].scalar_type());
    }
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
  const Posterior out = posterior(code, noise, low, high, /*keep=*/false);
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
