// plain_stack_train and residual_stack_train: a stack as one node of the autograd graph, for eager training. Python's way to
// the same, the ops' registered derivatives, costs more than the kernels of a small network; graphs (torch.compile,
// torch.export) and gradients of gradients take that way still.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cpu/batched_gradients.h"
#include "cpu/plain_stack.h"
#include "cpu/residual_stack.h"

namespace rvae::cpu::stack {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Weights, biases, gammas, betas; then running means and variances, which the backward does not keep: what the forward has
// normalised by is in its statistics, where no later batch changes it.
using Lists = std::array<Tensors, 6>;

struct Call {
  int64_t layers_per_unit;  // 0: a plain stack
  std::string order;
  std::string activation;
  double slope, eps;
  bool batch_statistics;
  at::ScalarType dtype;

  bool plain() const { return layers_per_unit == 0; }
  int64_t norms(const Lists& lists) const { return static_cast<int64_t>(lists[0].size()) - (plain() ? 1 : 0); }
};

// The output, and what the backward needs of the pass beside its inputs.
std::pair<at::Tensor, variable_list> run(const at::Tensor& x, const Lists& lists, const Call& c, at::ArrayRef<double> momentum,
                                         bool keep) {
  const auto& [weights, biases, gammas, betas, means, variances] = lists;
  at::Tensor out, inner, stream, statistics;
  if (c.plain()) {
    std::tie(out, inner, statistics) = plain_stack(x, weights, biases, gammas, betas, means, variances, c.activation, c.slope,
                                                   c.eps, c.batch_statistics, c.dtype, keep);
  } else {
    std::tie(out, inner, stream, statistics) =
        residual_stack(x, weights, biases, gammas, betas, means, variances, c.layers_per_unit, c.order, c.activation, c.slope,
                       c.eps, c.batch_statistics, c.dtype, keep);
  }
  if (c.batch_statistics && !means.empty()) update_running(means, variances, statistics, momentum);
  return {out, {inner, stream, statistics}};
}

// The forward pass by the op that can be differentiated twice.
at::Tensor differentiable_forward(const at::Tensor& x, const Lists& l, const Call& c) {
  auto& dispatcher = c10::Dispatcher::singleton();
  if (c.plain()) {
    using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, Tensors, Tensors, Tensors, Tensors, Tensors,
                                                                   Tensors, std::string_view, double, double, bool,
                                                                   at::ScalarType, bool);
    static const auto op = dispatcher.findSchemaOrThrow("rvae_fast::plain_stack", "").typed<Forward>();
    return std::get<0>(op.call(x, l[0], l[1], l[2], l[3], l[4], l[5], c.activation, c.slope, c.eps, c.batch_statistics, c.dtype,
                               /*keep=*/true));
  }
  using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors, int64_t, std::string_view, std::string_view, double,
      double, bool, at::ScalarType, bool);
  static const auto op = dispatcher.findSchemaOrThrow("rvae_fast::residual_stack", "").typed<Forward>();
  return std::get<0>(op.call(x, l[0], l[1], l[2], l[3], l[4], l[5], c.layers_per_unit, c.order, c.activation, c.slope, c.eps,
                             c.batch_statistics, c.dtype, /*keep=*/true));
}

// Running means and variances as a forward pass by them has found them.
void restore_running(const Call& c, const at::Tensor& statistics, Lists& lists) {
  for (int64_t i = 0; i < c.norms(lists); ++i) {
    // In a plain stack a norm is as wide as the output of its layer; in a residual one all widths are the same.
    const at::Tensor own = statistics.select(0, i).narrow(1, 0, lists[0][static_cast<size_t>(i)].size(0));
    lists[4].push_back(own.select(0, kMean));
    lists[5].push_back(own.select(0, kVariance));
  }
}

// Gradients that will be differentiated themselves: forward once more, then backward with a graph.
variable_list differentiable(const Call& call, const at::Tensor& gradient, const at::Tensor& x, const Lists& lists,
                             const std::vector<bool>& needs) {
  // Aliases: a parameter that is in the stack twice has a gradient at each place.
  variable_list sources{x.view_as(x)};
  Lists taken = lists;
  for (size_t i = 0; i < 4; ++i) {
    for (at::Tensor& t : taken[i]) sources.push_back(t = t.view_as(t));
  }
  const at::Tensor out = differentiable_forward(sources[0], taken, call);
  variable_list wanted;
  for (size_t i = 0; i < sources.size(); ++i) {
    if (needs[i]) wanted.push_back(sources[i]);
  }
  const variable_list found = torch::autograd::grad({out}, wanted, {gradient}, /*retain_graph=*/true, /*create_graph=*/true,
                                                    /*allow_unused=*/true);
  variable_list grads(sources.size());
  for (size_t i = 0, next = 0; i < sources.size(); ++i) {
    if (needs[i]) grads[i] = found[next++];
  }
  return grads;
}

// `needs` is one flag for x and each parameter, and so is the result.
variable_list gradients(const Call& c, const at::Tensor& gradient, const at::Tensor& x, const variable_list& kept,
                        const Lists& lists, const std::vector<bool>& needs) {
  const size_t layers = lists[0].size(), norms = static_cast<size_t>(c.norms(lists));
  std::array<std::vector<bool>, 4> flags;  // by list; none is needed of what is not there
  auto flag = needs.begin() + 1;
  for (size_t i = 0; i < 4; ++i) {
    const auto count = static_cast<int64_t>(lists[i].size());
    flags[i].assign(flag, flag + count);
    flag += count;
    if (count == 0) flags[i].assign(i < 2 ? layers : norms, false);
  }
  std::vector<bool> need_norms = flags[2];
  for (size_t i = 0; i < norms; ++i) need_norms[i] = flags[2][i] || flags[3][i];
  const Needs wanted{needs[0], flags[0], flags[1], need_norms};
  const Gradients g = c.plain() ? plain_stack_gradients(gradient, x, lists[0], lists[2], lists[3], kept[0], kept[2], c.activation,
                                                        c.slope, c.batch_statistics, c.dtype, wanted)
                                : residual_stack_gradients(gradient, x, lists[0], lists[2], lists[3], kept[0], kept[1], kept[2],
                                                           c.layers_per_unit, c.order, c.activation, c.slope, c.batch_statistics,
                                                           c.dtype, wanted);
  variable_list result{needs[0] ? g.x : at::Tensor()};
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
  return result;
}

class Stack : public torch::autograd::Function<Stack> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, at::TensorList weights, at::TensorList biases,
                            at::TensorList gammas, at::TensorList betas, const Tensors& means, const Tensors& variances,
                            const Call& call, at::ArrayRef<double> momentum) {
    const at::AutoDispatchBelowADInplaceOrView below;
    Lists lists{weights.vec(), biases.vec(), gammas.vec(), betas.vec(), means, variances};
    auto [out, saved] = run(x, lists, call, momentum, /*keep=*/true);
    saved.push_back(x);
    std::vector<int64_t> counts;
    for (size_t i = 0; i < 4; ++i) {
      saved.insert(saved.end(), lists[i].begin(), lists[i].end());
      counts.push_back(static_cast<int64_t>(lists[i].size()));
    }
    ctx->save_for_backward(std::move(saved));
    auto& data = ctx->saved_data;
    data["counts"] = std::move(counts);
    data["layers_per_unit"] = call.layers_per_unit;
    data["order"] = call.order;
    data["activation"] = call.activation;
    data["slope"] = call.slope;
    data["eps"] = call.eps;
    data["batch"] = call.batch_statistics;
    data["dtype"] = call.dtype;
    return out;
  }

  // One gradient for x and each parameter, and one for each of the other arguments, which have none.
  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    const auto& data = ctx->saved_data;
    const Call call{data.at("layers_per_unit").toInt(), data.at("order").toStringRef(), data.at("activation").toStringRef(),
                    data.at("slope").toDouble(),        data.at("eps").toDouble(),      data.at("batch").toBool(),
                    data.at("dtype").toScalarType()};
    variable_list saved = ctx->get_saved_variables();
    const variable_list kept(saved.begin(), saved.begin() + 3);
    const at::Tensor& x = saved[3];
    Lists lists;
    auto next = saved.begin() + 4;
    const std::vector<int64_t> counts = data.at("counts").toIntVector();
    std::vector<bool> needs{ctx->needs_input_grad(0)};
    for (size_t i = 0; i < counts.size(); ++i) {
      lists[i].assign(next, next + counts[i]);
      next += counts[i];
      for (int64_t k = 0; k < counts[i]; ++k) needs.push_back(ctx->needs_input_grad(needs.size()));
    }
    if (at::GradMode::is_enabled() && !call.batch_statistics) restore_running(call, kept[2], lists);
    variable_list result = one_by_one(incoming, [&](const variable_list& one) {
      if (at::GradMode::is_enabled()) return differentiable(call, one[0], x, lists, needs);
      const at::AutoDispatchBelowADInplaceOrView below;
      return gradients(call, one[0], x, kept, lists, needs);
    });
    result.resize(needs.size() + 4);
    return result;
  }
};

at::Tensor train(const at::Tensor& x, const Lists& lists, const Call& call, at::ArrayRef<double> momentum) {
  bool keep = x.requires_grad();
  for (size_t i = 0; i < 4; ++i) {
    for (const at::Tensor& t : lists[i]) keep = keep || t.requires_grad();
  }
  if (keep && at::GradMode::is_enabled()) {
    return Stack::apply(x, at::TensorList(lists[0]), at::TensorList(lists[1]), at::TensorList(lists[2]), at::TensorList(lists[3]),
                        lists[4], lists[5], call, momentum);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return run(x, lists, call, momentum, /*keep=*/false).first;
}

at::Tensor plain_stack_train(const at::Tensor& x, Tensors weights, Tensors biases, Tensors gammas, Tensors betas,
                             Tensors running_means, Tensors running_vars, std::string_view activation, double negative_slope,
                             double eps, at::ArrayRef<double> momentum, bool batch_statistics, at::ScalarType dtype) {
  const Lists lists{std::move(weights), std::move(biases),        std::move(gammas),
                    std::move(betas),   std::move(running_means), std::move(running_vars)};
  return train(x, lists, {0, "", std::string(activation), negative_slope, eps, batch_statistics, dtype}, momentum);
}

at::Tensor residual_stack_train(const at::Tensor& x, Tensors weights, Tensors biases, Tensors gammas, Tensors betas,
                                Tensors running_means, Tensors running_vars, int64_t layers, std::string_view order,
                                std::string_view activation, double negative_slope, double eps, at::ArrayRef<double> momentum,
                                bool batch_statistics, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(layers > 0, "residual_stack: layers must be at least 1, got ", layers);
  const Lists lists{std::move(weights), std::move(biases),        std::move(gammas),
                    std::move(betas),   std::move(running_means), std::move(running_vars)};
  return train(x, lists, {layers, std::string(order), std::string(activation), negative_slope, eps, batch_statistics, dtype},
               momentum);
}

}  // namespace

TORCH_LIBRARY_IMPL(rvae_fast, CPU, m) {  // under inference_mode
  m.impl("plain_stack_train", plain_stack_train);
  m.impl("residual_stack_train", residual_stack_train);
}

TORCH_LIBRARY_IMPL(rvae_fast, AutogradCPU, m) {
  m.impl("plain_stack_train", plain_stack_train);
  m.impl("residual_stack_train", residual_stack_train);
}

}  // namespace rvae::cpu::stack
