// rvae_fast::reconstruction_kld and its backward on the CPU: checks, choice of kernel, threads. The arithmetic is in
// reconstruction_kld_kernels.h, the contract in rvae_fast/ops/reconstruction_kld.py.
#include "reconstruction_kld.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "cpu_features.h"

namespace rvae::cpu::loss {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Rows are shared out in chunks of about this many elements: large enough to pay for waking a thread.
constexpr int64_t kElementsPerTask = 32768;
// The forward takes the error and the KL divergence of this many rows in turn: while one computes exponentials, the other's
// reads are under way.
constexpr int64_t kRowsTogether = 4;
// The gradient of the weights is summed over this many rows in the accumulation dtype, and over those sums in double: longer
// chains of fp32 additions lose more digits than PyTorch's sums do. The bits do not depend on the number of threads.
constexpr int64_t kRowsOfSum = 64;
// Gradients larger than this are written past the cache: whoever reads them next would not find them there in any case,
// and a cached store reads the line before it writes it.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

const Kernels& kernels(at::ScalarType accumulate) {
  if (accumulate == at::kDouble) return portable_kernels;
  return RVAE_IF_AVX512(avx512_kernels, RVAE_IF_AVX2(avx2_kernels, portable_kernels));
}

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return DType::Float64;
    case at::kBFloat16:
      return DType::BFloat16;
    case at::kHalf:
      return DType::Float16;
    default:
      return DType::Float32;
  }
}

void check_tensor(const char* name, const Tensor& t) {
  const auto type = t.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, "reconstruction_kld: ", name,
      " must be float32, float64, bfloat16 or float16, got ", type);
  TORCH_CHECK_VALUE(
      t.device().is_cpu() && t.layout() == at::kStrided, "reconstruction_kld: ", name, " must be a dense CPU tensor, got ",
      t.layout(), " on ", t.device());
}

struct Options {
  Likelihood likelihood;
  bool mean;
};

Options parse(std::string_view likelihood, std::string_view reduction) {
  Options options{};
  if (likelihood == "squared") {
    options.likelihood = Likelihood::Squared;
  } else if (likelihood == "absolute") {
    options.likelihood = Likelihood::Absolute;
  } else {
    TORCH_CHECK_VALUE(
        likelihood == "bernoulli", "reconstruction_kld: likelihood must be one of squared, absolute, bernoulli; got ",
        likelihood);
    options.likelihood = Likelihood::Bernoulli;
  }
  TORCH_CHECK_VALUE(
      reduction == "sum" || reduction == "mean", "reconstruction_kld: reduction must be one of sum, mean; got ", reduction);
  options.mean = reduction == "mean";
  return options;
}

// The inputs as the kernels want them: checked, fp64 all through if one is fp64, rows contiguous (which copies only what is
// not so already).
struct Inputs {
  Tensor x, x_hat, mu, logvar, weight;
  at::ScalarType accumulate = at::kFloat;
  int64_t batch = 0, features = 0;
  double scale = 1;
  Options options{};

  Inputs(
      const Tensor& x_in, const Tensor& x_hat_in, const OptionalTensor& mu_in, const OptionalTensor& logvar_in,
      const OptionalTensor& weight_in, std::string_view likelihood, std::string_view reduction)
      : options(parse(likelihood, reduction)) {
    check_tensor("x", x_in);
    check_tensor("x_hat", x_hat_in);
    TORCH_CHECK_VALUE(
        x_in.dim() == 2 && x_in.size(1) > 0, "reconstruction_kld: x must have shape [batch, features] with at least one feature, got ",
        x_in.sizes());
    TORCH_CHECK_VALUE(
        x_hat_in.sizes() == x_in.sizes(), "reconstruction_kld: x_hat must have the shape of x, ", x_in.sizes(), ", got ",
        x_hat_in.sizes());
    const bool variational = mu_in.has_value() && mu_in->defined();
    TORCH_CHECK_VALUE(
        variational == (logvar_in.has_value() && logvar_in->defined()),
        "reconstruction_kld: pass both of mu and logvar, or neither");
    batch = x_in.size(0);
    features = x_in.size(1);
    scale = options.mean ? 1.0 / static_cast<double>(features) : 1.0;
    if (variational) {
      check_tensor("mu", *mu_in);
      check_tensor("logvar", *logvar_in);
      TORCH_CHECK_VALUE(
          mu_in->dim() == 2 && mu_in->size(0) == batch && mu_in->size(1) > 0,
          "reconstruction_kld: mu must have shape [batch, latent] with batch ", batch, " and latent >= 1, got ", mu_in->sizes());
      TORCH_CHECK_VALUE(
          logvar_in->sizes() == mu_in->sizes(), "reconstruction_kld: logvar must have the shape of mu, ", mu_in->sizes(),
          ", got ", logvar_in->sizes());
    }
    const bool weighted = weight_in.has_value() && weight_in->defined();
    if (weighted) {
      check_tensor("feature_weight", *weight_in);
      TORCH_CHECK_VALUE(
          weight_in->dim() == 1 && weight_in->size(0) == features, "reconstruction_kld: feature_weight must have shape [", features,
          "], got ", weight_in->sizes());
    }

    for (const Tensor* t : {&x_in, &x_hat_in}) widen_if_double(*t);
    if (variational) {
      widen_if_double(*mu_in);
      widen_if_double(*logvar_in);
    }
    if (weighted) {
      widen_if_double(*weight_in);
      weight = weight_in->to(accumulate).contiguous();
    }
    // A pair of dtypes without a kernel of its own is brought to the accumulation dtype first.
    const auto pair = [&](const Tensor& a, const Tensor& b) {
      const auto ta = a.scalar_type(), tb = b.scalar_type();
      return accumulate == at::kDouble ? ta == at::kDouble && tb == at::kDouble : ta == tb || ta == at::kFloat;
    };
    const bool direct = pair(x_in, x_hat_in);
    x = rows(direct ? x_in : x_in.to(accumulate));
    x_hat = rows(direct ? x_hat_in : x_hat_in.to(accumulate));
    if (variational) {
      const bool same = mu_in->scalar_type() == logvar_in->scalar_type() && pair(*mu_in, *logvar_in);
      mu = rows(same ? *mu_in : mu_in->to(accumulate));
      logvar = rows(same ? *logvar_in : logvar_in->to(accumulate));
    }
  }

  static Rows view(const Tensor& t) { return {t.const_data_ptr(), t.stride(0)}; }
  const void* weight_data() const { return weight.defined() ? weight.const_data_ptr() : nullptr; }
  int64_t latent() const { return mu.size(1); }
  at::TensorOptions results() const { return x.options().dtype(accumulate); }

 private:
  void widen_if_double(const Tensor& t) {
    if (t.scalar_type() == at::kDouble) accumulate = at::kDouble;
  }
  static Tensor rows(const Tensor& t) { return t.stride(1) == 1 || t.size(1) == 1 ? t : t.contiguous(); }
};

int64_t rows_per_task(int64_t row_elements) { return std::max<int64_t>(1, kElementsPerTask / row_elements); }

std::tuple<Tensor, Tensor> forward(
    const Tensor& x, const Tensor& x_hat, const OptionalTensor& mu, const OptionalTensor& logvar,
    const OptionalTensor& feature_weight, std::string_view likelihood, std::string_view reduction) {
  const Inputs in(x, x_hat, mu, logvar, feature_weight, likelihood, reduction);
  Tensor error = at::empty({in.batch}, in.results());
  Tensor kld = in.mu.defined() ? at::empty({in.batch}, in.results()) : at::zeros({in.batch}, in.results());
  if (in.batch == 0) return {error, kld};

  const Kernels& set = kernels(in.accumulate);
  ErrorForward error_args{Inputs::view(in.x), Inputs::view(in.x_hat), in.weight_data(), in.features, in.scale, error.mutable_data_ptr()};
  const auto error_fn =
      set.error_forward(dtype_of(in.x), dtype_of(in.x_hat), in.options.likelihood, error_args.weight != nullptr);
  KldForward kld_args;
  KldForwardFn kld_fn = nullptr;
  if (in.mu.defined()) {
    kld_args = {Inputs::view(in.mu), Inputs::view(in.logvar), in.latent(), kld.mutable_data_ptr()};
    kld_fn = set.kld_forward(dtype_of(in.mu));
  }
  at::parallel_for(0, in.batch, rows_per_task(in.features), [&](int64_t begin, int64_t end) {
    if (kld_fn == nullptr) return error_fn(error_args, begin, end);
    for (int64_t b = begin; b < end; b += kRowsTogether) {
      const int64_t stop = std::min(end, b + kRowsTogether);
      error_fn(error_args, b, stop);
      kld_fn(kld_args, b, stop);
    }
  });
  return {error, kld};
}

// A gradient [batch] in the accumulation dtype; its stride may be 0.
Column column(const char* name, const OptionalTensor& grad, const Inputs& in, Tensor& keep) {
  TORCH_CHECK_VALUE(
      grad.has_value() && grad->defined(), "reconstruction_kld_backward: ", name, " is None, but a gradient that depends on it is needed");
  TORCH_CHECK_VALUE(
      grad->dim() == 1 && grad->size(0) == in.batch, "reconstruction_kld_backward: ", name, " must have shape [", in.batch,
      "], got ", grad->sizes());
  keep = grad->to(in.accumulate);
  return {keep.const_data_ptr(), keep.stride(0)};
}

// out[f] = the sum over `count` rows of values [count, features].
template <class S>
void sum_in_double(const void* values, int64_t count, int64_t features, double* out) {
  at::parallel_for(0, features, std::max<int64_t>(1, kElementsPerTask / count), [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < count; ++i) {
      const S* row = static_cast<const S*>(values) + i * features;
      for (int64_t f = begin; f < end; ++f) out[f] += static_cast<double>(row[f]);
    }
  });
}

Tensor run_with_weight_gradient(const Inputs& in, const ErrorBackward& args, ErrorBackwardFn fn) {
  const int64_t pieces = at::divup(in.batch, kRowsOfSum);
  Tensor partials = at::zeros({pieces, in.features}, in.results());
  char* base = static_cast<char*>(partials.mutable_data_ptr());
  const int64_t row_bytes = in.features * static_cast<int64_t>(partials.element_size());
  at::parallel_for(0, pieces, std::max<int64_t>(1, rows_per_task(in.features) / kRowsOfSum), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) fn(args, p * kRowsOfSum, std::min(in.batch, (p + 1) * kRowsOfSum), base + p * row_bytes);
  });
  Tensor total = at::zeros({in.features}, in.results().dtype(at::kDouble));
  const auto sum = in.accumulate == at::kDouble ? sum_in_double<double> : sum_in_double<float>;
  if (pieces > 0) sum(base, pieces, in.features, total.mutable_data_ptr<double>());
  return total.to(in.accumulate);
}

std::vector<Tensor> backward(
    const OptionalTensor& grad_error, const OptionalTensor& grad_kld, const Tensor& x, const Tensor& x_hat,
    const OptionalTensor& mu, const OptionalTensor& logvar, const OptionalTensor& feature_weight, std::string_view likelihood,
    std::string_view reduction, std::array<bool, 5> needs) {
  const Inputs in(x, x_hat, mu, logvar, feature_weight, likelihood, reduction);
  const Kernels& set = kernels(in.accumulate);
  std::array<Tensor, 5> grads;
  const auto wanted = [&](int i, const Tensor& prepared) {  // in the prepared input's dtype, contiguous
    if (!needs[i] || !prepared.defined()) return static_cast<void*>(nullptr);
    grads[i] = at::empty(prepared.sizes(), prepared.options());
    return grads[i].mutable_data_ptr();
  };

  const bool needs_weight = needs[4] && in.weight.defined();
  if (needs[0] || needs[1] || needs_weight) {
    Tensor keep;
    ErrorBackward args{Inputs::view(in.x), Inputs::view(in.x_hat), in.weight_data(), in.features, in.scale,
                       column("grad_error", grad_error, in, keep), wanted(0, in.x), wanted(1, in.x_hat)};
    const bool plain = needs[1] && !needs[0] && !needs_weight && args.weight == nullptr;
    args.stream = plain && static_cast<int64_t>(grads[1].nbytes()) > kStreamBytes;
    const auto fn = set.error_backward(dtype_of(in.x), dtype_of(in.x_hat), in.options.likelihood, plain);
    if (needs_weight) {
      grads[4] = run_with_weight_gradient(in, args, fn);
    } else {
      at::parallel_for(0, in.batch, rows_per_task(in.features), [&](int64_t begin, int64_t end) {
        fn(args, begin, end, nullptr);
      });
    }
  }
  if (in.mu.defined() && (needs[2] || needs[3])) {
    Tensor keep;
    const KldBackward args{Inputs::view(in.mu), Inputs::view(in.logvar), in.latent(), column("grad_kld", grad_kld, in, keep),
                           wanted(2, in.mu), wanted(3, in.logvar)};
    const auto fn = set.kld_backward(dtype_of(in.mu));
    at::parallel_for(0, in.batch, rows_per_task(in.latent()), [&](int64_t begin, int64_t end) { fn(args, begin, end); });
  }

  // In the inputs' own dtypes, which differ from the prepared ones only for the rare pairs.
  const std::array<const Tensor*, 5> inputs = {&x, &x_hat, mu ? &*mu : nullptr, logvar ? &*logvar : nullptr,
                                               feature_weight ? &*feature_weight : nullptr};
  std::vector<Tensor> result;
  for (int i = 0; i < 5; ++i) {
    if (grads[i].defined()) result.push_back(grads[i].to(inputs[i]->scalar_type()));
  }
  return result;
}

}  // namespace
}  // namespace rvae::cpu::loss

TORCH_LIBRARY_IMPL(rvae_fast, CPU, m) {
  m.impl("reconstruction_kld", TORCH_FN(rvae::cpu::loss::forward));
  m.impl("reconstruction_kld_backward", TORCH_FN(rvae::cpu::loss::backward));
}
