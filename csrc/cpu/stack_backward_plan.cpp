#include "cpu/stack_backward_plan.h"

namespace rvae::cpu::stack {

BackwardPlan::BackwardPlan(const Shape& shape, const Inputs& inputs, const ForwardResult& kept, const at::Tensor& gradient,
                           const at::Tensor& x_gradient, const GradientSums& sums, Scratch& scratch)
    : s_(shape), in_(inputs), kept_(kept), gradient_(gradient), x_gradient_(x_gradient), sums_(sums), scratch_(scratch),
      norm_vectors_(shape.padded()), stream_gradient_(rows_of(gradient_, shape.output(), 0)) {
  // In a plain stack, whose widths differ, dz is not replaced in place but written beside the one that is read.
  dz_bytes_ = round_up(s_.rows * s_.width * size_of(s_.compute), kAlignment);
  dz_ = scratch.add(dz_bytes_ * (s_.plain() ? 2 : 1));
  carried_ = scratch.add(s_.plain() ? 0 : s_.rows * s_.width * size_of(s_.stream));
}

Norm BackwardPlan::norm(int64_t layer) {
  return norm_vectors_.set(statistics(layer), s_.normed(layer), s_.padded(), data_or_null(in_.gammas, layer),
                           data_or_null(in_.betas, layer));
}

void BackwardPlan::set_norm(int64_t layer) {
  const int64_t normed = s_.order == Order::pre ? layer : layer - 1;
  norm_ = normed >= 0 ? norm(normed) : Norm{};
}

BackwardPrologue BackwardPlan::unnormed(int64_t width) const {
  BackwardPrologue p{};
  p.width = width;
  p.ld_operand = s_.operand_stride();
  return p;
}

// Gradient of what BatchNorm `norm` reads, `r`, from `dz`, the gradient behind it.
BackwardPrologue BackwardPlan::from_norm(int64_t norm, Rows dz, Rows r) const {
  BackwardPrologue p = unnormed(s_.normed(norm));
  p.dz = dz;
  p.r = r;
  p.mean = statistics(norm) + kMean * s_.padded();
  p.c1 = sums_.coefficients(0);
  p.c2 = sums_.coefficients(1);
  p.c3 = sums_.coefficients(2);
  return p;
}

BackwardPrologue BackwardPlan::gradient_of_raw(int64_t layer) {
  if (s_.order == Order::post) return from_norm(layer, read(s_.last_of_unit(layer) ? carried() : dz(layer)), inner(layer));
  if (layer == s_.layers - 1) {
    BackwardPrologue p = unnormed(s_.out(layer));
    p.carried = stream_gradient_;
    return p;
  }
  if (s_.plain()) return from_norm(layer, read(dz(layer)), inner(layer));
  if (!s_.last_of_unit(layer)) return from_norm(layer + 1, read(dz(layer)), inner(layer));
  BackwardPrologue p = from_norm(layer + 1, read(dz(layer)), stream(s_.unit(layer)));
  p.carried = stream_gradient_;
  p.carried_out = carried();
  stream_gradient_ = read(carried());
  return p;
}

Prologue BackwardPlan::operand_again(int64_t layer) const {
  Prologue p{};
  p.width = s_.in(layer);
  p.activation = s_.activation;
  p.slope = s_.slope;
  p.ld_operand = s_.operand_stride();
  p.activate = s_.order == Order::pre || !s_.first_of_unit(layer);
  p.source = s_.first_of_unit(layer) ? stream(s_.unit(layer) - 1) : inner(layer - 1);
  if (p.activate) p.norm = norm_;
  return p;
}

BackwardEpilogue BackwardPlan::before_layer(int64_t layer) const {
  BackwardEpilogue p{};
  p.width = s_.in(layer);
  p.activation = s_.activation;
  p.slope = s_.slope;
  p.norm = norm_;
  p.out = dz(layer - 1);
  if (s_.plain()) {
    if (layer > 0) {
      p.r = inner(layer - 1);
    } else {
      p.out = x_gradient();
    }
  } else if (s_.order == Order::pre) {
    p.r = s_.first_of_unit(layer) ? stream(s_.unit(layer) - 1) : inner(layer - 1);
  } else if (!s_.first_of_unit(layer)) {
    p.r = inner(layer - 1);
  } else {
    p.carried = read(carried());
    p.out = carried();
    if (layer == 0) {
      p.norm = {};
      p.out = x_gradient();
    } else {
      p.r = inner(layer - 1);
      p.residual = stream(s_.unit(layer) - 2);
    }
  }
  return p;
}

BackwardEpilogue BackwardPlan::end_of_post() {
  BackwardEpilogue p{};
  p.width = s_.width;
  p.activation = s_.activation;
  p.slope = s_.slope;
  p.norm = norm(s_.layers - 1);
  p.r = inner(s_.layers - 1);
  p.residual = stream(s_.units() - 2);
  p.carried = stream_gradient_;
  p.out = carried();
  return p;
}

BackwardPrologue BackwardPlan::end_of_pre() const {
  BackwardPrologue p = from_norm(0, read(dz(-1)), stream(-1));
  p.carried = stream_gradient_;
  p.carried_out = x_gradient();
  return p;
}

}  // namespace rvae::cpu::stack
