// autoencoder_gradients: the loss of a plain autoencoder on a batch and the gradient of every parameter, in one call. It is
// what the model's loss_terms and autograd do, operation by operation (rvae_fast/models.py, rvae_fast/_stepper.py), without
// the dispatch, the graph and the Python between them, which in a network of a few small layers take longer than its kernels.
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

namespace rvae::cpu::stack {

namespace {

using OptionalTensor = std::optional<at::Tensor>;

struct Options {
  std::string_view activation;
  double slope, eps;
  at::ScalarType dtype;
};

// A plain stack with what it keeps for its backward; `lists` are weights, biases, norm weights and norm biases.
struct Stack {
  std::array<Tensors, 4> lists;
  Tensors running_means, running_vars;
  at::ArrayRef<double> momentum;
  at::Tensor input, inner, statistics;

  at::Tensor forward(const at::Tensor& x, const Options& o) {
    input = x;
    at::Tensor out;
    std::tie(out, inner, statistics) = plain_stack(x, lists[0], lists[1], lists[2], lists[3], running_means, running_vars,
                                                   o.activation, o.slope, o.eps, /*batch_statistics=*/true, o.dtype, /*keep=*/true);
    if (!running_means.empty()) update_running(running_means, running_vars, statistics, momentum);
    return out;
  }

  Gradients backward(const at::Tensor& gradient, const Options& o, bool need_input) const {
    const size_t layers = lists[0].size(), norms = layers - 1;
    const Needs needs{need_input, std::vector<bool>(layers, true), std::vector<bool>(layers, !lists[1].empty()),
                      std::vector<bool>(norms, !lists[2].empty())};
    return plain_stack_gradients(gradient, input, lists[0], lists[2], lists[3], inner, statistics, o.activation, o.slope,
                                 /*batch_statistics=*/true, o.dtype, needs);
  }
};

// The posterior of a variational model: mean, log variance inside (low, high), and a sample.
class Posterior {
 public:
  Posterior(const at::Tensor& code, double low, double high) : kind_(code.scalar_type()), low_(low), high_(high) {
    const at::Tensor wide = code.to(at::kFloat);
    const int64_t latent = wide.size(1) / 2;
    mu = wide.narrow(1, 0, latent);
    below_high_ = at::rsub(wide.narrow(1, latent, latent), high_);
    above_low_ = at::rsub(at::softplus(below_high_), high_).sub_(low_);
    logvar = at::softplus(above_low_).add_(low_);
    deviation_ = at::exp(logvar * 0.5);
    noise_ = at::randn_like(mu);
    z = mu + deviation_ * noise_;
  }

  // The gradient of the code from those of the sample and of the divergence.
  at::Tensor backward(const at::Tensor& of_z, const at::Tensor& of_mu, const at::Tensor& of_logvar) const {
    at::Tensor g = (of_z * noise_).mul_(deviation_).mul_(0.5).add_(of_logvar);
    g = at::softplus_backward(g, above_low_, 1.0, 20.0);
    g = at::softplus_backward(g.neg_(), below_high_, 1.0, 20.0).neg_();
    return at::cat({of_z + of_mu, g}, 1).to(kind_);
  }

  at::Tensor mu, logvar, z;

 private:
  at::ScalarType kind_;
  double low_, high_;
  at::Tensor below_high_, above_low_, deviation_, noise_;
};

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

// Writes gradients to, or adds them to, their places in `out`, one after another; returns where the next ones go.
int64_t put(const Gradients& g, const at::Tensor& out, int64_t offset, bool add) {
  for (const at::Tensor& part : {g.weights, g.biases, g.gammas, g.betas}) {
    const float* from = part.const_data_ptr<float>();
    float* to = out.data_ptr<float>() + offset;
    for (int64_t i = 0; i < part.numel(); ++i) to[i] = add ? to[i] + from[i] : from[i];
    offset += part.numel();
  }
  return offset;
}

int64_t size_of(const Stack& stack) {
  int64_t total = 0;
  for (const Tensors& list : stack.lists) {
    for (const at::Tensor& t : list) total += t.numel();
  }
  return total;
}

at::Tensor autoencoder_gradients(const at::Tensor& x, at::ArrayRef<at::Tensor> encoder, at::ArrayRef<int64_t> encoder_counts,
                                 at::ArrayRef<double> encoder_momentum, at::ArrayRef<at::Tensor> decoder,
                                 at::ArrayRef<int64_t> decoder_counts, at::ArrayRef<double> decoder_momentum,
                                 std::string_view activation, double negative_slope, double eps, at::ScalarType dtype,
                                 std::string_view likelihood, bool variational, double low, double high, double kld_weight, int64_t n,
                                 bool add, const at::Tensor& gradient) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto stack = [](at::ArrayRef<at::Tensor> tensors, at::ArrayRef<int64_t> counts, at::ArrayRef<double> momentum) {
    TORCH_CHECK_VALUE(counts.size() == 6, "autoencoder_gradients: six lists of tensors are expected for each stack");
    std::array<Tensors, 6> lists;
    size_t next = 0;
    for (size_t i = 0; i < 6; ++i) {
      const auto count = static_cast<size_t>(counts[i]);
      TORCH_CHECK_VALUE(next + count <= tensors.size(), "autoencoder_gradients: the counts are not those of the tensors");
      lists[i] = tensors.slice(next, count).vec();
      next += count;
    }
    return Stack{{lists[0], lists[1], lists[2], lists[3]}, lists[4], lists[5], momentum, {}, {}, {}};
  };
  Stack first = stack(encoder, encoder_counts, encoder_momentum), second = stack(decoder, decoder_counts, decoder_momentum);
  TORCH_CHECK_VALUE(gradient.dim() == 1 && gradient.scalar_type() == at::kFloat && gradient.is_contiguous() &&
                        gradient.numel() == size_of(first) + size_of(second),
                    "autoencoder_gradients: gradient must be contiguous float32 with a place for every parameter");
  const Options o{activation, negative_slope, eps, dtype};

  const at::Tensor code = first.forward(x, o);
  std::optional<Posterior> posterior;
  if (variational) posterior.emplace(code, low, high);
  const at::Tensor raw = second.forward(variational ? posterior->z : code, o);
  const OptionalTensor mu = variational ? OptionalTensor(posterior->mu) : std::nullopt;
  const OptionalTensor logvar = variational ? OptionalTensor(posterior->logvar) : std::nullopt;
  const auto [errors, klds] = losses(x, raw, mu, logvar, likelihood);

  // Sums over n, not means over the batch: a shorter last batch weighs what its rows weigh.
  const at::Tensor error = errors.sum().div_(n), kld = klds.sum().div_(n);
  const at::Tensor terms = at::stack({error + kld * kld_weight, error, kld});

  const auto column = [&](double weight) { return at::full({}, weight, error.options()).div_(n).expand({x.size(0)}); };
  const OptionalTensor of_kld = variational ? OptionalTensor(column(kld_weight)) : std::nullopt;
  const auto of = loss_gradients(column(1.0), of_kld, x, raw, mu, logvar, likelihood);
  const Gradients g2 = second.backward(of[0], o, /*need_input=*/true);
  const at::Tensor of_code = variational ? posterior->backward(g2.x, of[1], of[2]) : g2.x;
  const Gradients g1 = first.backward(of_code, o, /*need_input=*/false);
  put(g2, gradient, put(g1, gradient, 0, add), add);
  return terms;
}

}  // namespace

TORCH_LIBRARY_IMPL(rvae_fast, CompositeExplicitAutograd, m) {
  m.impl("autoencoder_gradients", autoencoder_gradients);
}

}  // namespace rvae::cpu::stack
