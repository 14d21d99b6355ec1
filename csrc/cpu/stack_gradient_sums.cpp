#include "cpu/stack_gradient_sums.h"

#include <cstring>

namespace rvae::cpu::stack {

GradientSums::GradientSums(const Shape& shape, const Partition& partition, Scratch& scratch)
    : rows_(shape.rows), tiles_(partition.tiles), padded_(shape.padded()), scratch_(scratch), k_(kernels()) {
  dz_ = scratch.add(tiles_ * padded_ * 4);
  dz_xhat_ = scratch.add(tiles_ * padded_ * 4);
  bias_ = scratch.add(tiles_ * padded_ * 4);
  coefficients_ = scratch.add(3 * padded_ * 4);
  totals_ = scratch.add(2 * padded_ * 8);
}

void GradientSums::clear() const {
  std::memset(scratch_.get<char>(coefficients_), 0, static_cast<size_t>(3 * padded_) * 4);
}

float* GradientSums::cleared_bias(int64_t tile) const {
  float* const sum = scratch_.get<float>(bias_) + tile * padded_;
  std::memset(sum, 0, static_cast<size_t>(padded_) * 4);
  return sum;
}

void GradientSums::finish_norm(int64_t width, const float* rstd, const float* gamma, bool batch_statistics,
                               float* gamma_gradient, float* beta_gradient) const {
  double* const sum = scratch_.get<double>(totals_);
  double* const sum_xhat = sum + padded_;
  k_.sum_tiles(dz(0), tiles_, padded_, width, sum);
  k_.sum_tiles(dz_xhat(0), tiles_, padded_, width, sum_xhat);
  if (gamma_gradient != nullptr) {
    for (int64_t c = 0; c < width; ++c) gamma_gradient[c] = static_cast<float>(sum_xhat[c]);
  }
  if (beta_gradient != nullptr) {
    for (int64_t c = 0; c < width; ++c) beta_gradient[c] = static_cast<float>(sum[c]);
  }
  float* const c1 = scratch_.get<float>(coefficients_);
  float* const c2 = c1 + padded_;
  float* const c3 = c2 + padded_;
  const double share = 1.0 / static_cast<double>(rows_);
  for (int64_t c = 0; c < width; ++c) {
    c1[c] = gamma == nullptr ? rstd[c] : gamma[c] * rstd[c];
    // Not by a share of zero: the sum over rows of which one is NaN would be NaN for all of them still.
    c2[c] = batch_statistics ? static_cast<float>(sum[c] * share) : 0.0f;
    c3[c] = batch_statistics ? static_cast<float>(rstd[c] * sum_xhat[c] * share) : 0.0f;
  }
}

void GradientSums::finish_bias(int64_t width, float* gradient) const {
  double* const sum = scratch_.get<double>(totals_);
  k_.sum_tiles(scratch_.get<float>(bias_), tiles_, padded_, width, sum);
  for (int64_t c = 0; c < width; ++c) gradient[c] = static_cast<float>(sum[c]);
}

}  // namespace rvae::cpu::stack
