// plain_stack_train: a plain stack as one node of the autograd graph, for eager training. Python's way to the same, the
// op's registered derivative, costs more than the kernels of a small network; graphs (torch.compile, torch.export) and
// gradients of gradients take that way still.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cpu/plain_stack.h"

namespace rvae::cpu::stack {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Call {
  Tensors running_means, running_vars;
  std::string_view activation;
  double slope, eps;
  at::ArrayRef<double> momentum;
  bool batch_statistics;
  at::ScalarType dtype;
};

at::Tensor run(const at::Tensor& x, Tensors weights, Tensors biases, Tensors gammas, Tensors betas, const Call& call, bool keep,
               variable_list& kept) {
  auto [out, inner, statistics] =
      plain_stack(x, std::move(weights), std::move(biases), std::move(gammas), std::move(betas), call.running_means,
                  call.running_vars, call.activation, call.slope, call.eps, call.batch_statistics, call.dtype, keep);
  if (call.batch_statistics && !call.running_means.empty()) {
    update_running(call.running_means, call.running_vars, statistics, call.momentum);
  }
  kept = {std::move(inner), std::move(statistics)};
  return out;
}

// The gradients by the op that can be differentiated again: forward once more, then backward with a graph.
variable_list differentiable(const AutogradContext& ctx, const at::Tensor& gradient, const at::Tensor& x,
                             const std::vector<Tensors>& lists, const std::vector<bool>& needs) {
  using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors, std::string_view, double, double, bool,
      at::ScalarType, bool);
  static const auto forward =
      c10::Dispatcher::singleton().findSchemaOrThrow("rvae_fast::plain_stack", "").typed<Forward>();
  // Aliases: a parameter that is in the stack twice has a gradient at each place.
  variable_list sources{x.view_as(x)};
  std::vector<Tensors> taken(4);
  for (size_t i = 0; i < 4; ++i) {
    for (const at::Tensor& t : lists[i]) {
      taken[i].push_back(t.view_as(t));
      sources.push_back(taken[i].back());
    }
  }
  const auto& saved = ctx.saved_data;
  const at::Tensor out = std::get<0>(forward.call(
      sources[0], taken[0], taken[1], taken[2], taken[3], lists[4], lists[5], saved.at("activation").toStringView(),
      saved.at("slope").toDouble(), saved.at("eps").toDouble(), saved.at("batch").toBool(), saved.at("dtype").toScalarType(),
      /*keep=*/true));
  variable_list wanted;
  for (size_t i = 0; i < sources.size(); ++i) {
    if (needs[i]) wanted.push_back(sources[i]);
  }
  const variable_list found = torch::autograd::grad({out}, wanted, {gradient}, /*retain_graph=*/true, /*create_graph=*/true,
                                                    /*allow_unused=*/true);
  variable_list grads(sources.size() + 1);
  for (size_t i = 0, next = 0; i < sources.size(); ++i) {
    if (needs[i]) grads[i] = found[next++];
  }
  return grads;
}

class PlainStack : public torch::autograd::Function<PlainStack> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, at::TensorList weights, at::TensorList biases,
                            at::TensorList gammas, at::TensorList betas, const Call& call) {
    const at::AutoDispatchBelowADInplaceOrView below;
    variable_list kept;
    at::Tensor out = run(x, weights.vec(), biases.vec(), gammas.vec(), betas.vec(), call, /*keep=*/true, kept);
    variable_list saved{x, std::move(kept[0]), std::move(kept[1])};
    std::vector<int64_t> counts;
    const Tensors none;
    for (const at::TensorList list : {weights, biases, gammas, betas, at::TensorList(call.batch_statistics ? none : call.running_means),
                                      at::TensorList(call.batch_statistics ? none : call.running_vars)}) {
      saved.insert(saved.end(), list.begin(), list.end());
      counts.push_back(static_cast<int64_t>(list.size()));
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["counts"] = std::move(counts);
    ctx->saved_data["activation"] = std::string(call.activation);
    ctx->saved_data["slope"] = call.slope;
    ctx->saved_data["eps"] = call.eps;
    ctx->saved_data["batch"] = call.batch_statistics;
    ctx->saved_data["dtype"] = call.dtype;
    return out;
  }

  // One gradient for x and each parameter, and one for `call`, which has none.
  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    variable_list saved = ctx->get_saved_variables();
    const std::vector<int64_t> counts = ctx->saved_data["counts"].toIntVector();
    std::vector<Tensors> lists;
    auto next = saved.begin() + 3;
    for (const int64_t count : counts) {
      lists.emplace_back(next, next + count);
      next += count;
    }
    std::vector<bool> needs;
    const size_t inputs = 1 + lists[0].size() + lists[1].size() + lists[2].size() + lists[3].size();
    for (size_t i = 0; i < inputs; ++i) needs.push_back(ctx->needs_input_grad(i));
    if (at::GradMode::is_enabled()) return differentiable(*ctx, gradients[0], saved[0], lists, needs);

    const at::AutoDispatchBelowADInplaceOrView below;
    const size_t layers = lists[0].size(), norms = layers - 1;
    std::vector<std::vector<bool>> flags;  // by list; none is needed of what is not there
    auto flag = needs.begin() + 1;
    for (size_t i = 0; i < 4; ++i) {
      flags.emplace_back(flag, flag + static_cast<int64_t>(lists[i].size()));
      flag += static_cast<int64_t>(lists[i].size());
      if (lists[i].empty()) flags.back().assign(i < 2 ? layers : norms, false);
    }
    std::vector<bool> need_norms = flags[2];
    for (size_t i = 0; i < norms; ++i) need_norms[i] = flags[2][i] || flags[3][i];
    const auto& data = ctx->saved_data;
    const Gradients g = plain_stack_gradients(gradients[0], saved[0], lists[0], lists[2], lists[3], saved[1], saved[2],
                                              data.at("activation").toStringView(), data.at("slope").toDouble(),
                                              data.at("batch").toBool(), data.at("dtype").toScalarType(),
                                              {needs[0], flags[0], flags[1], need_norms});
    variable_list result;
    result.reserve(inputs + 1);
    result.push_back(needs[0] ? g.x : at::Tensor());
    const at::Tensor flat[] = {g.weights, g.biases, g.gammas, g.betas};
    for (size_t i = 0; i < 4; ++i) {
      int64_t offset = 0;
      for (size_t k = 0; k < lists[i].size(); ++k) {
        const at::Tensor& own = lists[i][k];
        const std::vector<int64_t> strides = own.dim() == 2 ? std::vector<int64_t>{own.size(1), 1} : std::vector<int64_t>{1};
        result.push_back(flags[i][k] ? flat[i].as_strided(own.sizes(), strides, offset) : at::Tensor());
        offset += own.numel();
      }
    }
    result.emplace_back();
    return result;
  }
};

at::Tensor train(const at::Tensor& x, Tensors weights, Tensors biases, Tensors gammas, Tensors betas, Tensors running_means,
                 Tensors running_vars, std::string_view activation, double negative_slope, double eps,
                 at::ArrayRef<double> momentum, bool batch_statistics, at::ScalarType dtype) {
  const Call call{std::move(running_means), std::move(running_vars), activation, negative_slope, eps, momentum, batch_statistics,
                  dtype};
  bool keep = x.requires_grad();
  for (const Tensors* list : {&weights, &biases, &gammas, &betas}) {
    for (const at::Tensor& t : *list) keep = keep || t.requires_grad();
  }
  if (keep && at::GradMode::is_enabled()) {
    return PlainStack::apply(x, at::TensorList(weights), at::TensorList(biases), at::TensorList(gammas), at::TensorList(betas), call);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  variable_list kept;
  return run(x, std::move(weights), std::move(biases), std::move(gammas), std::move(betas), call, /*keep=*/false, kept);
}

}  // namespace

TORCH_LIBRARY_IMPL(rvae_fast, CPU, m) {
  m.impl("plain_stack_train", train);  // under inference_mode
}

TORCH_LIBRARY_IMPL(rvae_fast, AutogradCPU, m) {
  m.impl("plain_stack_train", train);
}

}  // namespace rvae::cpu::stack
