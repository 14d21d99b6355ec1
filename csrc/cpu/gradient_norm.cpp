// gradient_norm: the L2 norm of fp32 tensors taken together, one pass over them. Sums are kept in fp32 over short runs and
// in double beyond; runs and their order depend on the tensors alone, so that the result does not depend on the threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace rvae::cpu {

namespace {

constexpr int64_t kRun = int64_t{1} << 14;
constexpr int64_t kLanes = 16;

double sum_of_squares(const float* values, int64_t n) {
  float lanes[kLanes] = {};
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += values[i + l] * values[i + l];
  }
  double sum = 0.0;
  for (const float lane : lanes) sum += static_cast<double>(lane);
  for (int64_t i = whole; i < n; ++i) sum += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  return sum;
}

at::Tensor gradient_norm(at::TensorList tensors) {
  struct Run {
    const float* values;
    int64_t count;
  };
  std::vector<Run> runs;
  for (const at::Tensor& t : tensors) {
    TORCH_CHECK_VALUE(t.is_cpu() && t.scalar_type() == at::kFloat && t.is_non_overlapping_and_dense(),
                      "gradient_norm: tensors must be dense float32 on the CPU, got ", t.scalar_type(), " on ", t.device());
    const float* values = t.const_data_ptr<float>();
    for (int64_t i = 0; i < t.numel(); i += kRun) runs.push_back({values + i, std::min(kRun, t.numel() - i)});
  }
  std::vector<double> sums(runs.size());
  at::parallel_for(0, static_cast<int64_t>(runs.size()), 32, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[i] = sum_of_squares(runs[i].values, runs[i].count);
  });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return at::scalar_tensor(std::sqrt(total), at::TensorOptions().dtype(at::kFloat));
}

}  // namespace

TORCH_LIBRARY_IMPL(rvae_fast, CPU, m) {
  m.impl("gradient_norm", gradient_norm);
}

}  // namespace rvae::cpu
