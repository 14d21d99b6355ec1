// The sums over the rows that the backward pass of a stack gathers tile by tile: of the gradients behind a BatchNorm (its
// parameters' gradients, and the coefficients of its input's) and of those of a layer's output (its bias' gradient).
#pragma once

#include "cpu/stack_pass.h"

namespace rvae::cpu::stack {

class GradientSums {
 public:
  // Reserves what it needs in `scratch`; clear() follows once that is allocated.
  GradientSums(const Shape& shape, const Partition& partition, Scratch& scratch);
  void clear() const;

  // Where a tile's column sums of dz, and of dz * xhat, are to be written.
  float* dz(int64_t tile) const { return scratch_.get<float>(dz_) + tile * padded_; }
  float* dz_xhat(int64_t tile) const { return scratch_.get<float>(dz_xhat_) + tile * padded_; }
  // Where a tile's column sums of dy are to be added up; all zero. A strip a tile, as above: one that all rows of a thread
  // were added to would lose a digit to a hundred thousand of them.
  float* cleared_bias(int64_t tile) const;

  // Once all tiles are done, for a BatchNorm of `width` columns: the gradients of its parameters, where not nullptr, and
  // the coefficients below. Without `batch_statistics` the statistics do not depend on the rows.
  void finish_norm(int64_t width, const float* rstd, const float* gamma, bool batch_statistics, float* gamma_gradient,
                   float* beta_gradient) const;
  // The same for a bias.
  void finish_bias(int64_t width, float* gradient) const;

  // Gradient of the norm's input: c[0] * (dz - c[1] - (r - mean) * c[2]), column by column.
  const float* coefficients(int64_t i) const { return scratch_.get<float>(coefficients_) + i * padded_; }

 private:
  const int64_t rows_, tiles_, padded_;
  const Scratch& scratch_;
  const Kernels& k_;
  int64_t dz_, dz_xhat_, bias_, coefficients_, totals_;
};

}  // namespace rvae::cpu::stack
