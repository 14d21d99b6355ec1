// Backward pass of a stack: one pass over the rows a layer, from the last to the first that needs a gradient.
// For a tile of rows, with r the layer's raw output and `source` what the layer read:
//
//   1. dy = gradient of r, from dz (the gradient behind the BatchNorm that reads r) by the BatchNorm's rule, plus the
//      stream's gradient where r is on the stream; its column sums are the gradient of the bias
//   2. a = act(norm(source)), computed again;  weight gradient += dy^T a
//   3. dz of the layer before = (dy W) * act'(norm(source)), with its column sums and those of dz * xhat
//
// The BatchNorm's rule needs the column sums of all rows, hence the pass a layer. dz and the stream's gradient are
// replaced in place, row by row. Which ones they are is stack_backward_plan.h's, the weight gradients are
// stack_weight_gradient.h's, the sums stack_gradient_sums.h's.
#include <ATen/ops/zeros.h>

#include <cstring>
#include <optional>

#include "cpu/stack_backward_plan.h"
#include "cpu/stack_gradient_sums.h"
#include "cpu/stack_pass.h"
#include "cpu/stack_weight_gradient.h"

namespace rvae::cpu::stack {

namespace {

class BackwardPass {
 public:
  BackwardPass(const Shape& shape, const Inputs& inputs, const ForwardResult& kept, const at::Tensor& gradient,
               const Needs& needs, const Gradients* into)
      : s_(shape), in_(inputs), needs_(needs), part_(shape.rows, shape.tile_rows(), shape.row_work()),
        packed_(inputs.weights, shape, /*forward=*/false), k_(kernels()) {
    if (into != nullptr) {
      g_ = *into;
    } else {
      g_.weights = gradients(needs_.weights, s_.weights_before(s_.layers));
      g_.biases = gradients(needs_.biases, s_.vectors_before(s_.layers));
      g_.gammas = gradients(needs_.norms, s_.vectors_before(s_.norms()));
      g_.betas = gradients(needs_.norms, s_.vectors_before(s_.norms()));
    }
    g_.x = empty_large({needs_.x ? s_.rows : 0, s_.in(0)}, in_.x.options());

    // Tiles are read in whole blocks of 16 words by the transposition.
    tile_rows_ = round_up(part_.most_rows(), kRowBlock);
    operand_bytes_ = round_up(tile_rows_ * s_.operand_stride() * size_of(s_.compute), kAlignment);
    strip_bytes_ = round_up(tile_rows_ * kPanel * 4, kAlignment);

    dys_ = scratch_.add(part_.chunks * operand_bytes_);
    strips_ = scratch_.add(part_.chunks * strip_bytes_);
    plan_.emplace(s_, in_, kept, gradient, g_.x, sums_, scratch_);
    weight_gradient_.emplace(s_, part_, tile_rows_, scratch_, g_.weights);
    scratch_.allocate();
    std::memset(scratch_.get<char>(dys_), 0, static_cast<size_t>(part_.chunks * operand_bytes_));
    sums_.clear();
  }

  Gradients run() {
    const int64_t last = s_.layers - 1;
    if (s_.order == Order::post) {
      end_of_post();
      finish_sums(last);
    }
    int64_t pending = -1;  // a layer whose weight gradient has its second half to come
    for (int64_t layer = last; layer >= 0; --layer) {
      const bool further = needs_below(layer);
      run_layer(layer, further, pending);
      pending = needs_.weights[layer] ? layer : -1;
      if (needs_.biases[layer]) finish_bias(layer);
      if (!further) break;
      const int64_t normed = s_.order == Order::pre ? layer : layer - 1;
      if (normed >= 0) finish_sums(normed);
    }
    if (pending >= 0) part_.for_chunks([&](int64_t chunk) { finish_weight(pending, chunk); });
    if (needs_.x && s_.order == Order::pre) end_of_pre();
    return g_;
  }

 private:
  static bool any(const std::vector<bool>& flags) { return std::find(flags.begin(), flags.end(), true) != flags.end(); }

  // Zero where nothing is asked for; what is asked for gets written.
  at::Tensor gradients(const std::vector<bool>& needs, int64_t size) const {
    if (!any(needs)) size = 0;
    const auto options = in_.x.options().dtype(at::kFloat);
    const bool all = std::find(needs.begin(), needs.end(), false) == needs.end();
    return all ? empty_large({size}, options) : at::zeros({size}, options);
  }

  // Whether anything that a gradient is wanted of lies before the product of `layer`.
  bool needs_below(int64_t layer) const {
    if (needs_.x || (s_.order == Order::pre && needs_.norms[layer])) return true;
    for (int64_t l = 0; l < layer; ++l) {
      if (needs_.weights[l] || needs_.biases[l] || needs_.norms[l]) return true;
    }
    return false;
  }

  template <class T>
  T* of_chunk(int64_t offset, int64_t bytes, int64_t chunk) const {
    return scratch_.get<T>(offset + chunk * bytes);
  }

  // ------------------------------------------------------------------------------------------------ the steps of a layer

  void run_layer(int64_t layer, bool further, int64_t pending) {
    plan_->set_norm(layer);
    const BackwardPrologue before = plan_->gradient_of_raw(layer);
    const Prologue again = plan_->operand_again(layer);
    const bool want_weight = needs_.weights[layer], want_bias = needs_.biases[layer];
    const BackwardEpilogue after = further ? plan_->before_layer(layer) : BackwardEpilogue{};
    part_.for_chunks([&](int64_t chunk) {
      if (pending >= 0) finish_weight(pending, chunk);
      const RowsOut dy{of_chunk<char>(dys_, operand_bytes_, chunk), s_.compute};
      for (int64_t t = part_.first_tile(chunk); t < part_.first_tile(chunk + 1); ++t) {
        gradient_tile(before, t, dy, want_bias ? sums_.cleared_bias(t) : nullptr);
        if (want_weight) {
          weight_gradient_->make_operand(layer, chunk, t, source_tile(again, t));
          weight_gradient_->add(layer, chunk, t, static_cast<const char*>(dy.data));
        }
        if (further) input_gradient(layer, chunk, t, after);
      }
      release_products(s_.compute);
    });
  }

  // Rows that pad a tile take part in the weight gradient: zero. (Its columns of padding are the kernels' to clear.)
  void clear_padding(RowsOut operand, int64_t rows) const {
    const int64_t row_bytes = s_.operand_stride() * size_of(s_.compute);
    std::memset(static_cast<char*>(operand.data) + rows * row_bytes, 0, static_cast<size_t>((tile_rows_ - rows) * row_bytes));
  }

  void finish_weight(int64_t layer, int64_t chunk) const {
    weight_gradient_->finish(layer, chunk);
    release_products(s_.compute);
  }

  void gradient_tile(const BackwardPrologue& whole, int64_t tile, RowsOut dy, float* bias_sum) const {
    BackwardPrologue p = of_tile(whole, tile);
    p.operand = dy;
    p.column_sum = bias_sum;
    k_.backward_prologue(p);
    clear_padding(dy, p.rows);
  }

  // Points the matrices of `p` at one tile.
  BackwardPrologue of_tile(BackwardPrologue p, int64_t tile) const {
    const int64_t offset = part_.begin(tile) * p.width;
    p.rows = part_.count(tile);
    p.dz = at_offset(p.dz, offset);
    p.r = at_offset(p.r, offset);
    p.carried = at_offset(p.carried, offset);
    p.carried_out = at_offset(p.carried_out, offset);
    return p;
  }

  Prologue source_tile(Prologue p, int64_t tile) const {
    p.rows = part_.count(tile);
    p.source = at_offset(p.source, part_.begin(tile) * p.width);
    return p;
  }

  void input_gradient(int64_t layer, int64_t chunk, int64_t tile, BackwardEpilogue p) const {
    const BackwardEpilogue whole = p;
    const int64_t reduced = product_terms(s_.out(layer), s_.compute);
    float* const strip = of_chunk<float>(strips_, strip_bytes_, chunk);
    p.rows = part_.count(tile);
    p.strip = strip;
    for (int64_t panel = 0; panel < Shape::panels(p.width); ++panel) {
      multiply(s_.compute, product_rows(p.rows, s_.compute), reduced, of_chunk<char>(dys_, operand_bytes_, chunk), s_.operand_stride(),
               packed_.panel(layer, panel), kPanel, strip, kPanel, /*add=*/false);
      place(p, whole, tile, panel * kPanel);
      if (p.norm.mean == nullptr && p.carried.data == nullptr) {  // the input of a plain stack: the product itself
        Epilogue store{};
        store.rows = p.rows;
        store.columns = p.columns;
        store.width = p.width;
        store.strip = strip;
        store.out = p.out;
        k_.epilogue(store);
      } else {
        k_.backward_epilogue(p);
      }
    }
  }

  // Points the matrices of `p` at one panel of one tile.
  void place(BackwardEpilogue& p, const BackwardEpilogue& whole, int64_t tile, int64_t column) const {
    const int64_t offset = part_.begin(tile) * whole.width + column;
    p.columns = std::min(kPanel, whole.width - column);
    p.r = at_offset(whole.r, offset);
    p.residual = at_offset(whole.residual, offset);
    p.carried = at_offset(whole.carried, offset);
    p.out = at_offset(whole.out, offset);
    if (whole.norm.mean != nullptr) {
      p.norm = {whole.norm.mean + column, whole.norm.rstd + column, whole.norm.scale + column, whole.norm.beta + column};
    }
    p.sum_dz = sums_.dz(tile) + column;
    p.sum_dz_xhat = sums_.dz_xhat(tile) + column;
  }

  // --------------------------------------------------------------------------------------------- both ends of the stack

  void end_of_post() {
    const BackwardEpilogue whole = plan_->end_of_post();
    part_.for_chunks([&](int64_t chunk) {
      float* const strip = of_chunk<float>(strips_, strip_bytes_, chunk);
      std::memset(strip, 0, static_cast<size_t>(strip_bytes_));
      BackwardEpilogue p = whole;
      p.strip = strip;
      for (int64_t t = part_.first_tile(chunk); t < part_.first_tile(chunk + 1); ++t) {
        p.rows = part_.count(t);
        for (int64_t column = 0; column < s_.width; column += kPanel) {
          place(p, whole, t, column);
          k_.backward_epilogue(p);
        }
      }
    });
  }

  void end_of_pre() {
    const BackwardPrologue whole = plan_->end_of_pre();
    part_.for_chunks([&](int64_t chunk) {
      for (int64_t t = part_.first_tile(chunk); t < part_.first_tile(chunk + 1); ++t) k_.backward_prologue(of_tile(whole, t));
    });
  }

  // --------------------------------------------------------------------------------------------------- sums over the rows

  void finish_sums(int64_t layer) const {
    const int64_t first = s_.vectors_before(layer);
    float* const gamma = needs_.norms[layer] ? g_.gammas.data_ptr<float>() + first : nullptr;
    float* const beta = needs_.norms[layer] ? g_.betas.data_ptr<float>() + first : nullptr;
    sums_.finish_norm(s_.normed(layer), plan_->statistics(layer) + kRstd * s_.padded(), data_or_null(in_.gammas, layer),
                      in_.batch_statistics, gamma, beta);
  }

  void finish_bias(int64_t layer) const {
    sums_.finish_bias(s_.out(layer), g_.biases.data_ptr<float>() + s_.vectors_before(layer));
  }

  const Shape s_;
  const Inputs& in_;
  const Needs& needs_;
  const Partition part_;
  PackedWeights packed_;
  const Kernels& k_;
  Scratch scratch_;
  GradientSums sums_{s_, part_, scratch_};
  int64_t tile_rows_, operand_bytes_, strip_bytes_, dys_, strips_;
  Gradients g_;
  std::optional<BackwardPlan> plan_;
  std::optional<WeightGradient> weight_gradient_;
};

}  // namespace

Gradients backward(const Shape& shape, const Inputs& inputs, const ForwardResult& kept, const at::Tensor& gradient,
                   const Needs& needs, const Gradients* into) {
  return BackwardPass(shape, inputs, kept, gradient, needs, into).run();
}

}  // namespace rvae::cpu::stack
