// rvae_fast::posterior and its backward on the CPU: checks, choice of kernel, threads. The arithmetic is in posterior_kernels_impl.h.
#include "cpu/posterior.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>

#include "cpu/cpu_features.h"
#include "cpu/posterior_kernels.h"

namespace rvae::cpu::posterior {

namespace {

constexpr int64_t kElementsPerTask = 16384;  // some 20 us, several times what waking a thread costs

const Kernels& kernels() {
  return RVAE_IF_AVX512(avx512_kernels, RVAE_IF_AVX2(avx2_kernels, portable_kernels));
}

DType dtype_of(at::ScalarType type) { return type == at::kBFloat16 ? DType::BFloat16 : DType::Float32; }

int64_t rows_per_task(int64_t latent) { return std::max<int64_t>(1, kElementsPerTask / latent); }

}  // namespace

Posterior posterior(const at::Tensor& code, const at::Tensor& noise, double low, double high, bool keep) {
  const auto type = code.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16, "posterior: code must be float32 or bfloat16, got ", type);
  TORCH_CHECK_VALUE(code.dim() == 2 && code.size(1) > 0 && code.size(1) % 2 == 0,
                    "posterior: code must have shape [batch, 2 * latent] with latent >= 1, got ", code.sizes());
  const int64_t batch = code.size(0), latent = code.size(1) / 2;
  TORCH_CHECK_TYPE(noise.scalar_type() == at::kFloat, "posterior: noise must be float32, got ", noise.scalar_type());
  TORCH_CHECK_VALUE(noise.dim() == 2 && noise.size(0) == batch && noise.size(1) == latent, "posterior: noise must have shape [",
                    batch, ", ", latent, "], got ", noise.sizes());
  TORCH_CHECK_VALUE(code.device().is_cpu() && noise.device().is_cpu(), "posterior: code and noise must be on the CPU, got ",
                    code.device(), " and ", noise.device());
  TORCH_CHECK_VALUE(low < high, "posterior: low must be below high, got ", low, " and ", high);

  const at::Tensor rows = code.stride(1) == 1 ? code : code.contiguous(), numbers = noise.contiguous();
  const auto make = [&](bool wanted = true) { return at::empty({wanted ? batch : 0, latent}, numbers.options()); };
  Posterior out{make(), make(), make(), make(keep), make(keep)};
  if (batch == 0) return out;
  const Forward args{rows.const_data_ptr(),
                     rows.stride(0),
                     latent,
                     static_cast<float>(low),
                     static_cast<float>(high),
                     numbers.const_data_ptr<float>(),
                     out.mu.mutable_data_ptr<float>(),
                     out.logvar.mutable_data_ptr<float>(),
                     out.z.mutable_data_ptr<float>(),
                     keep ? out.slope.mutable_data_ptr<float>() : nullptr,
                     keep ? out.spread.mutable_data_ptr<float>() : nullptr};
  const ForwardFn run = kernels().forward(dtype_of(type), keep);
  at::parallel_for(0, batch, rows_per_task(latent), [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return out;
}

at::Tensor posterior_gradient(const at::Tensor& of_z, const at::Tensor& of_mu, const at::Tensor& of_logvar,
                              const at::Tensor& slope, const at::Tensor& spread, at::ScalarType dtype) {
  const int64_t batch = slope.size(0), latent = slope.size(1);
  const auto prepared = [](const at::Tensor& t) { return t.defined() ? t.to(at::kFloat).contiguous() : t; };
  const auto data = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; };
  const at::Tensor z = prepared(of_z), mu = prepared(of_mu), logvar = prepared(of_logvar);
  at::Tensor out = at::empty({batch, 2 * latent}, slope.options().dtype(dtype));
  if (batch == 0) return out;
  const Backward args{data(z), data(mu), data(logvar), data(slope), data(spread), latent, out.mutable_data_ptr()};
  const BackwardFn run = kernels().backward(dtype_of(dtype));
  at::parallel_for(0, batch, rows_per_task(latent), [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return out;
}

namespace {

using OptionalTensor = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& code, const at::Tensor& noise,
                                                                               double low, double high, bool keep) {
  Posterior out = posterior(code, noise, low, high, keep);
  return {std::move(out.mu), std::move(out.logvar), std::move(out.z), std::move(out.slope), std::move(out.spread)};
}

at::Tensor backward(const OptionalTensor& of_mu, const OptionalTensor& of_logvar, const OptionalTensor& of_z,
                    const at::Tensor& slope, const at::Tensor& spread, at::ScalarType dtype) {
  const auto or_undefined = [](const OptionalTensor& t) { return t.value_or(at::Tensor()); };
  return posterior_gradient(or_undefined(of_z), or_undefined(of_mu), or_undefined(of_logvar), slope, spread, dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(rvae_fast, CPU, m) {
  m.impl("posterior", forward);
  m.impl("posterior_backward", backward);
}

}  // namespace rvae::cpu::posterior
