// autoencoder_gradients: the loss of an autoencoder on a batch and the gradient of every parameter, in one call. It is what the
// model's loss_terms and autograd do, operation by operation (rvae_fast/models.py, rvae_fast/_stepper.py), without the
// dispatch, the graph and the Python between them, which in a network of a few small layers take longer than its kernels.
// Encoder and decoder are sequences of parts: plain stacks, transitions (a plain stack of one layer), residual stacks.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/plain_stack.h"
#include "cpu/posterior.h"
#include "cpu/residual_stack.h"

namespace rvae::cpu::stack {

namespace {

using OptionalTensor = std::optional<at::Tensor>;

struct Options {
  std::string_view order, activation;
  double slope, eps;
  at::ScalarType dtype;
};

// A part of the network with what it keeps for its backward. `lists` are weights, biases, norm weights and norm biases.
struct Part {
  std::array<Tensors, 4> lists;
  Tensors running_means, running_vars;
  at::ArrayRef<double> momentum;
  int64_t layers_per_unit;  // 0: a plain stack
  at::Tensor input, inner, stream, statistics;

  bool plain() const { return layers_per_unit == 0; }
  // A transition in fp32: there torch's products of tall, narrow matrices are the faster ones, by up to a fifth.
  bool linear(const Options& o) const { return plain() && lists[0].size() == 1 && o.dtype == at::kFloat; }
  size_t norms() const { return lists[0].size() - (plain() ? 1 : 0); }

  at::Tensor forward(const at::Tensor& x, const Options& o) {
    const auto& [weights, biases, gammas, betas] = lists;
    input = x;
    at::Tensor out;
    if (linear(o)) {
      return biases.empty() ? at::mm(x, weights[0].t()) : at::addmm(biases[0], x, weights[0].t());
    } else if (plain()) {
      std::tie(out, inner, statistics) = plain_stack(x, weights, biases, gammas, betas, running_means, running_vars, o.activation,
                                                     o.slope, o.eps, /*batch_statistics=*/true, o.dtype, /*keep=*/true);
    } else {
      std::tie(out, inner, stream, statistics) =
          residual_stack(x, weights, biases, gammas, betas, running_means, running_vars, layers_per_unit, o.order, o.activation,
                         o.slope, o.eps, /*batch_statistics=*/true, o.dtype, /*keep=*/true);
    }
    if (!running_means.empty()) update_running(running_means, running_vars, statistics, momentum);
    return out;
  }

  // The gradient of the input, if needed. Those of the parameters are written to, or added to, `into`, list after list.
  at::Tensor backward(const at::Tensor& gradient, const Options& o, bool need_input, const at::Tensor& into, bool add) const {
    const Needs needs{need_input, std::vector<bool>(lists[0].size(), true),
                      std::vector<bool>(lists[0].size(), !lists[1].empty()), std::vector<bool>(norms(), !lists[2].empty())};
    Gradients places;
    int64_t offset = 0;
    const std::array<at::Tensor*, 4> own{&places.weights, &places.biases, &places.gammas, &places.betas};
    for (size_t i = 0; i < own.size(); ++i) {
      const int64_t size = size_of(lists[i]);
      *own[i] = into.narrow(0, offset, size);
      offset += size;
    }
    if (linear(o)) {
      at::Tensor weight = places.weights.view(lists[0][0].sizes());
      add ? weight.add_(at::mm(gradient.t(), input)) : at::mm_out(weight, gradient.t(), input);
      if (!lists[1].empty()) add ? places.biases.add_(gradient.sum(0)) : at::sum_out(places.biases, gradient, 0);
      return need_input ? at::mm(gradient, lists[0][0]) : at::Tensor();
    }
    const Gradients* direct = add ? nullptr : &places;
    const Gradients g = plain() ? plain_stack_gradients(gradient, input, lists[0], lists[2], lists[3], inner, statistics,
                                                        o.activation, o.slope, /*batch_statistics=*/true, o.dtype, needs, direct)
                                : residual_stack_gradients(gradient, input, lists[0], lists[2], lists[3], inner, stream, statistics,
                                                           layers_per_unit, o.order, o.activation, o.slope,
                                                           /*batch_statistics=*/true, o.dtype, needs, direct);
    if (add) {
      const std::array<const at::Tensor*, 4> found{&g.weights, &g.biases, &g.gammas, &g.betas};
      for (size_t i = 0; i < own.size(); ++i) own[i]->add_(*found[i]);
    }
    return g.x;
  }

  // Its places in the flat gradient: a part begins where a cache line does, so that a product written there rounds as one
  // that is written to memory of its own.
  int64_t places() const {
    int64_t total = 0;
    for (const Tensors& list : lists) total += size_of(list);
    return round_up(total, kAlignment / static_cast<int64_t>(sizeof(float)));
  }

 private:
  static int64_t size_of(const Tensors& list) {
    int64_t total = 0;
    for (const at::Tensor& t : list) total += t.numel();
    return total;
  }
};

std::vector<Part> make_parts(at::ArrayRef<at::Tensor> tensors, at::ArrayRef<int64_t> counts, at::ArrayRef<double> momentum,
                             at::ArrayRef<int64_t> layers_per_unit) {
  constexpr size_t kLists = 6;
  TORCH_CHECK_VALUE(counts.size() == kLists * layers_per_unit.size(),
                    "autoencoder_gradients: six lists of tensors are expected for each part");
  std::vector<Part> parts;
  size_t next = 0, norm = 0;
  for (size_t k = 0; k < layers_per_unit.size(); ++k) {
    std::array<Tensors, kLists> lists;
    for (size_t i = 0; i < kLists; ++i) {
      const auto count = static_cast<size_t>(counts[k * kLists + i]);
      TORCH_CHECK_VALUE(counts[k * kLists + i] >= 0 && count <= tensors.size() - next, "autoencoder_gradients: the counts are not those of the tensors");
      lists[i] = tensors.slice(next, count).vec();
      next += count;
    }
    TORCH_CHECK_VALUE(!lists[0].empty() && lists[2].size() == lists[3].size(),
                      "autoencoder_gradients: a part must have weights, and norms both a weight and a bias or neither");
    Part part{{lists[0], lists[1], lists[2], lists[3]}, lists[4], lists[5], {}, layers_per_unit[k], {}, {}, {}, {}};
    TORCH_CHECK_VALUE(norm + part.norms() <= momentum.size(), "autoencoder_gradients: momentum must have an entry for each norm");
    part.momentum = momentum.slice(norm, part.norms());
    norm += part.norms();
    parts.push_back(std::move(part));
  }
  return parts;
}

std::tuple<at::Tensor, at::Tensor> losses(const at::Tensor& x, const at::Tensor& raw, const OptionalTensor& mu,
                                          const OptionalTensor& logvar, std::string_view likelihood) {
  using Forward = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                                     const OptionalTensor&, const OptionalTensor&, c10::string_view, c10::string_view);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("rvae_fast::reconstruction_kld", "").typed<Forward>();
  return op.call(x, raw, mu, logvar, std::nullopt, likelihood, "sum");
}

std::vector<at::Tensor> loss_gradients(const at::Tensor& of_error, const OptionalTensor& of_kld, const at::Tensor& x,
                                       const at::Tensor& raw, const OptionalTensor& mu, const OptionalTensor& logvar,
                                       std::string_view likelihood) {
  using Backward = std::vector<at::Tensor>(const OptionalTensor&, const OptionalTensor&, const at::Tensor&, const at::Tensor&,
                                           const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, c10::string_view,
                                           c10::string_view, std::array<bool, 5>);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rvae_fast::reconstruction_kld_backward", "").typed<Backward>();
  const bool both = mu.has_value();
  return op.call(of_error, of_kld, x, raw, mu, logvar, std::nullopt, likelihood, "sum", {false, true, both, both, false});
}

at::Tensor autoencoder_gradients(const at::Tensor& x, at::ArrayRef<at::Tensor> tensors, at::ArrayRef<int64_t> counts,
                                 at::ArrayRef<double> momentum, at::ArrayRef<int64_t> layers_per_unit, int64_t encoder_parts,
                                 std::string_view order, std::string_view activation, double negative_slope, double eps,
                                 at::ScalarType dtype, std::string_view likelihood, bool variational, double low, double high,
                                 double kld_weight, int64_t n, bool add, const at::Tensor& gradient) {
  const at::AutoDispatchBelowADInplaceOrView below;
  std::vector<Part> parts = make_parts(tensors, counts, momentum, layers_per_unit);
  TORCH_CHECK_VALUE(encoder_parts > 0 && encoder_parts < static_cast<int64_t>(parts.size()),
                    "autoencoder_gradients: encoder and decoder must have a part each");
  int64_t places = 0;
  for (const Part& part : parts) places += part.places();
  TORCH_CHECK_VALUE(gradient.dim() == 1 && gradient.scalar_type() == at::kFloat && gradient.is_contiguous() &&
                        gradient.numel() == places,
                    "autoencoder_gradients: gradient must be contiguous float32 with a place for every parameter");
  const Options o{order, activation, negative_slope, eps, dtype};
  const auto forward = [&](at::Tensor rows, int64_t from, int64_t to) {
    for (int64_t k = from; k < to; ++k) rows = parts[static_cast<size_t>(k)].forward(rows, o);
    return rows;
  };
  int64_t behind = places;  // where the gradients of the parts that are done begin
  const auto backward = [&](at::Tensor of_rows, int64_t from, int64_t to) {
    for (int64_t k = to - 1; k >= from; --k) {
      const Part& part = parts[static_cast<size_t>(k)];
      behind -= part.places();
      of_rows = part.backward(of_rows, o, /*need_input=*/k > 0, gradient.narrow(0, behind, part.places()), add);
    }
    return of_rows;
  };

  const auto all = static_cast<int64_t>(parts.size());
  const at::Tensor code = forward(x, 0, encoder_parts);
  posterior::Posterior sampled;
  if (variational) {
    const at::Tensor noise = at::randn({code.size(0), code.size(1) / 2}, code.options().dtype(at::kFloat));
    sampled = posterior::posterior(code, noise, low, high, /*keep=*/true);
  }
  const at::Tensor raw = forward(variational ? sampled.z : code, encoder_parts, all);
  const OptionalTensor mu = variational ? OptionalTensor(sampled.mu) : std::nullopt;
  const OptionalTensor logvar = variational ? OptionalTensor(sampled.logvar) : std::nullopt;
  const auto [errors, klds] = losses(x, raw, mu, logvar, likelihood);

  // Sums over n, not means over the batch: a shorter last batch weighs what its rows weigh.
  const at::Tensor error = errors.sum().div_(n), kld = klds.sum().div_(n);
  const at::Tensor terms = at::stack({error + kld * kld_weight, error, kld});

  const auto column = [&](double weight) { return at::full({}, weight, error.options()).div_(n).expand({x.size(0)}); };
  const OptionalTensor of_kld = variational ? OptionalTensor(column(kld_weight)) : std::nullopt;
  const auto of = loss_gradients(column(1.0), of_kld, x, raw, mu, logvar, likelihood);
  const at::Tensor of_z = backward(of[0], encoder_parts, all);
  const auto of_code = [&] {
    return posterior::posterior_gradient(of_z, of[1], of[2], sampled.slope, sampled.spread, code.scalar_type());
  };
  backward(variational ? of_code() : of_z, 0, encoder_parts);
  return terms;
}

}  // namespace

TORCH_LIBRARY_IMPL(rvae_fast, CompositeExplicitAutograd, m) {
  m.impl("autoencoder_gradients", autoencoder_gradients);
}

TORCH_LIBRARY_IMPL(rvae_fast, AutogradCPU, m) {  // it takes gradients, and has none itself
  m.impl("autoencoder_gradients", torch::CppFunction::makeFallthrough());
}

}  // namespace rvae::cpu::stack
