// clipped_adam: one step of Adam or AdamW for a list of parameters, gradients divided by max(1, norm / max_norm) as they are
// read. The arithmetic is that of torch's fused kernel; that one enters a parallel region for every tensor, which for the
// tensors of a small network takes longer than the step itself.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

namespace rvae::cpu {

namespace {

using Tensors = std::vector<at::Tensor>;

constexpr int64_t kRun = int64_t{1} << 12;
constexpr int64_t kRunsPerTask = 8;  // some 10 us, several times what waking a thread costs

struct Constants {
  float inverse_of_scale, decay, beta1, beta2, eps;
  bool decoupled;
};

struct Run {
  float *parameter, *mean, *square;
  const float* gradient;
  int64_t count;
  float step_size, root_of_bias;
};

// By value and with names of its own for every constant, or the compiler takes them for what the stores may change.
void update_values(float* __restrict parameter, float* __restrict mean, float* __restrict square, const float* __restrict gradient,
                   int64_t count, float step_size, float root_of_bias, Constants k) {
  const float shrink = k.decoupled ? 1.0f - k.decay : 1.0f, added = k.decoupled ? 0.0f : k.decay;
  const float inverse = k.inverse_of_scale, rest1 = 1.0f - k.beta1, beta2 = k.beta2, rest2 = 1.0f - k.beta2, eps = k.eps;
  const float inverse_root = 1.0f / root_of_bias;
  for (int64_t i = 0; i < count; ++i) {
    const float p = parameter[i] * shrink;
    const float g = gradient[i] * inverse + added * p;
    const float m = mean[i] + rest1 * (g - mean[i]);
    const float v = beta2 * square[i] + rest2 * g * g;
    mean[i] = m;
    square[i] = v;
    parameter[i] = p - step_size * m / (std::sqrt(v) * inverse_root + eps);
  }
}

void update(const Run& r, const Constants& k) {
  update_values(r.parameter, r.mean, r.square, r.gradient, r.count, r.step_size, r.root_of_bias, k);
}

void check(const char* name, const Tensors& tensors, const Tensors& parameters) {
  TORCH_CHECK_VALUE(tensors.size() == parameters.size(), "clipped_adam: ", name, " has ", tensors.size(), " tensors, expected ",
                    parameters.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    TORCH_CHECK_VALUE(tensors[i].is_cpu() && tensors[i].scalar_type() == at::kFloat && tensors[i].is_contiguous() &&
                          tensors[i].sizes() == parameters[i].sizes(),
                      "clipped_adam: ", name, " must be contiguous float32 on the CPU in the shapes of the parameters, got ",
                      tensors[i].scalar_type(), " ", tensors[i].sizes(), ", expected ", parameters[i].sizes());
  }
}

void clipped_adam(Tensors parameters, Tensors gradients, Tensors means, Tensors squares, const at::Tensor& steps,
                  const at::Tensor& learning_rate, double beta1, double beta2, double eps, double weight_decay, bool decoupled,
                  const at::Tensor& norm, std::optional<double> max_norm, const std::optional<at::Tensor>& blocked) {
  check("parameters", parameters, parameters);
  check("gradients", gradients, parameters);
  check("means", means, parameters);
  check("squares", squares, parameters);
  TORCH_CHECK_VALUE(steps.dim() == 1 && steps.scalar_type() == at::kFloat && steps.is_contiguous() &&
                        steps.size(0) == static_cast<int64_t>(parameters.size()),
                    "clipped_adam: steps must be float32 with an entry for each parameter, got ", steps.sizes());
  if (blocked.has_value() && blocked->item().toFloat() != 0.0f) return;
  const double rate = learning_rate.item().toDouble();
  // 1e-6 as torch.nn.utils.clip_grad_norm_ has it.
  const float scale =
      max_norm.has_value() ? std::max(1.0f, (norm.item().toFloat() + 1e-6f) / static_cast<float>(*max_norm)) : 1.0f;
  const Constants constants{1.0f / scale, static_cast<float>(decoupled ? rate * weight_decay : weight_decay),
                            static_cast<float>(beta1), static_cast<float>(beta2), static_cast<float>(eps), decoupled};
  std::vector<Run> runs;
  auto* const count = steps.data_ptr<float>();
  for (size_t i = 0; i < parameters.size(); ++i) {
    count[i] += 1.0f;
    const auto step = static_cast<double>(count[i]);
    Run run{parameters[i].data_ptr<float>(), means[i].data_ptr<float>(), squares[i].data_ptr<float>(),
            gradients[i].const_data_ptr<float>(), 0, static_cast<float>(rate / (1.0 - std::pow(beta1, step))),
            static_cast<float>(std::sqrt(1.0 - std::pow(beta2, step)))};
    for (int64_t left = parameters[i].numel(); left > 0; left -= kRun) {
      run.count = std::min(kRun, left);
      runs.push_back(run);
      run.parameter += run.count, run.mean += run.count, run.square += run.count, run.gradient += run.count;
    }
  }
  at::parallel_for(0, static_cast<int64_t>(runs.size()), kRunsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) update(runs[i], constants);
  });
  // As a kernel of torch's would: who remembers the version sees that the tensor was written.
  for (const Tensors* list : {&parameters, &means, &squares}) {
    for (const at::Tensor& t : *list) {
      if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
    }
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(rvae_fast, CompositeExplicitAutograd, m) {
  m.impl("clipped_adam", clipped_adam);
}

}  // namespace rvae::cpu
