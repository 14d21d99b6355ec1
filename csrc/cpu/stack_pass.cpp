#include "cpu/stack_pass.h"

#include <ATen/ops/empty.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rvae::cpu::stack {

at::Tensor empty_large(at::IntArrayRef sizes, at::TensorOptions options) {
  at::Tensor tensor = at::empty(sizes, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = uintptr_t{1} << 21;
  const auto begin = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + huge - 1) / huge * huge;
  const auto end = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + tensor.nbytes()) / huge * huge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: refusal changes nothing
#endif
  return tensor;
}

void Scratch::allocate() {
  memory_ = empty_large({size_ + kAlignment}, at::TensorOptions().dtype(at::kByte));
  const auto address = reinterpret_cast<uintptr_t>(memory_.data_ptr());
  base_ = reinterpret_cast<char*>((address + kAlignment - 1) / kAlignment * kAlignment);
}

Norm NormVectors::set(const float* statistics, int64_t width, int64_t padded_width, const float* gamma, const float* beta) {
  const float* rstd = statistics + kRstd * padded_width;
  for (int64_t c = 0; c < width; ++c) {
    scale_[c] = gamma == nullptr ? rstd[c] : gamma[c] * rstd[c];
    beta_[c] = beta == nullptr ? 0.0f : beta[c];
  }
  return {statistics + kMean * padded_width, rstd, scale_.data(), beta_.data()};
}

PackedWeights::PackedWeights(const std::vector<at::Tensor>& weights, const Shape& shape, bool forward)
    : panels_(shape.panels()), panel_words_(panel_words(shape.width, shape.compute)) {
  const int64_t count = static_cast<int64_t>(weights.size()) * panels_;
  memory_ = empty_large({count * panel_words_ + kAlignment / 4}, at::TensorOptions().dtype(at::kInt));
  const auto address = reinterpret_cast<uintptr_t>(memory_.data_ptr());
  auto* const packed = reinterpret_cast<uint32_t*>((address + kAlignment - 1) / kAlignment * kAlignment);
  words_ = packed;
  at::parallel_for(0, count, 4, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> scratch(panel_words_);
    for (int64_t i = begin; i < end; ++i) {
      const float* weight = weights[i / panels_].const_data_ptr<float>();
      const auto pack = forward ? pack_forward : pack_backward;
      pack(weight, shape.width, shape.width, i % panels_, shape.compute, packed + i * panel_words_, scratch.data());
    }
  });
}


}  // namespace rvae::cpu::stack
