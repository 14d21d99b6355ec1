// What each step of the backward pass of a stack reads and writes: the matrices, norms and coefficients of a layer, for
// all rows. stack_backward.cpp walks the tiles.
#pragma once

#include "cpu/stack_gradient_sums.h"
#include "cpu/stack_pass.h"

namespace rvae::cpu::stack {

class BackwardPlan {
 public:
  // Reserves what it needs in `scratch`. `gradient` is that of the stack's output, `x_gradient` the input's to be written.
  BackwardPlan(const Shape& shape, const Inputs& inputs, const ForwardResult& kept, const at::Tensor& gradient,
               const at::Tensor& x_gradient, const GradientSums& sums, Scratch& scratch);

  // For one layer after another, from the last to the first, and in this order.
  void set_norm(int64_t layer);                    // the BatchNorm before the layer's operand
  BackwardPrologue gradient_of_raw(int64_t layer);  // dy
  Prologue operand_again(int64_t layer) const;      // what the layer read, as in the forward pass
  BackwardEpilogue before_layer(int64_t layer) const;  // dz of the layer before, but for the strip and the sums

  // Before the last layer, post-activation: the gradient of the last unit's sum, from the gradient of its activation.
  BackwardEpilogue end_of_post();
  // Behind the first layer, pre-activation: the gradient of the input, behind the first BatchNorm and along the stream.
  BackwardPrologue end_of_pre() const;

  const float* statistics(int64_t layer) const { return kept_.statistics.const_data_ptr<float>() + layer * 3 * s_.padded(); }

 private:
  BackwardPrologue from_norm(int64_t norm, Rows dz, Rows r) const;
  BackwardPrologue unnormed(int64_t width) const;
  Norm norm(int64_t layer);

  Rows inner(int64_t layer) const { return rows_of(kept_.inner, s_.compute, s_.inner_begin(layer)); }
  // The stream behind unit `unit` (never the last one, which nobody needs again); unit -1 is the input.
  Rows stream(int64_t unit) const {
    if (unit < 0) return rows_of(in_.x, s_.stream, 0);
    return rows_of(kept_.stream, s_.stream, unit * s_.rows * s_.width);
  }
  // The gradient behind the BatchNorm that reads the raw output of `layer`.
  RowsOut dz(int64_t layer) const { return {scratch_.get<char>(dz_ + (s_.plain() ? layer % 2 * dz_bytes_ : 0)), s_.compute}; }
  RowsOut carried() const { return {scratch_.get<char>(carried_), s_.stream}; }
  RowsOut x_gradient() const { return rows_out(x_gradient_, s_.stream, 0); }
  static Rows read(RowsOut m) { return {m.data, m.kind}; }

  const Shape& s_;
  const Inputs& in_;
  const ForwardResult& kept_;
  const at::Tensor gradient_, x_gradient_;
  const GradientSums& sums_;
  const Scratch& scratch_;
  NormVectors norm_vectors_;
  Norm norm_{};
  Rows stream_gradient_;
  int64_t dz_bytes_, dz_, carried_;
};

}  // namespace rvae::cpu::stack
