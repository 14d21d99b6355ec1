// Backward pass of a stack: one pass over the rows a layer, from the last to the first that needs a gradient.
// For a tile of rows, with r the layer's raw output and `source` what the layer read:
//
//   1. dy = gradient of r, from dz (the gradient behind the BatchNorm that reads r) by the BatchNorm's rule, plus the
//      stream's gradient where r is on the stream; its column sums are the gradient of the bias
//   2. a = act(norm(source)), computed again;  weight gradient += dy^T a
//   3. dz of the layer before = (dy W) * act'(norm(source)), with its column sums and those of dz * xhat
//
// The BatchNorm's rule needs the column sums of all rows, hence the pass a layer. dz and the stream's gradient are
// replaced in place, row by row; the weight gradients are stack_weight_gradient.h's.
#include <ATen/ops/zeros.h>

#include <cstring>
#include <optional>

#include "cpu/stack_pass.h"
#include "cpu/stack_weight_gradient.h"

namespace rvae::cpu::stack {

namespace {

class BackwardPass {
 public:
  BackwardPass(const Shape& shape, const Inputs& inputs, const ForwardResult& kept, const at::Tensor& gradient,
               const Needs& needs, const Gradients* into)
      : s_(shape), in_(inputs), kept_(kept), gradient_(gradient), needs_(needs), part_(shape.rows, kTileRows, shape.row_work()),
        norm_vectors_(shape.padded()), packed_(inputs.weights, shape, /*forward=*/false), k_(kernels()) {
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
    const int64_t block = 16 * 4 / size_of(s_.compute);
    tile_rows_ = round_up(part_.most_rows(), block);
    operand_bytes_ = round_up(tile_rows_ * s_.operand_stride() * size_of(s_.compute), kAlignment);
    strip_bytes_ = round_up(tile_rows_ * kPanel * 4, kAlignment);

    dys_ = scratch_.add(part_.chunks * operand_bytes_);
    strips_ = scratch_.add(part_.chunks * strip_bytes_);
    bias_sums_ = scratch_.add(part_.chunks * s_.padded() * 4);
    sums_dz_ = scratch_.add(part_.tiles * s_.padded() * 4);
    sums_dz_xhat_ = scratch_.add(part_.tiles * s_.padded() * 4);
    coefficients_ = scratch_.add(3 * s_.padded() * 4);
    totals_ = scratch_.add(2 * s_.padded() * 8);
    // In a plain stack, whose widths differ, dz is not replaced in place but written beside the one that is read.
    dz_bytes_ = round_up(s_.rows * s_.width * size_of(s_.compute), kAlignment);
    dz_ = scratch_.add(dz_bytes_ * (s_.plain() ? 2 : 1));
    carried_ = scratch_.add(s_.plain() ? 0 : s_.rows * s_.width * size_of(s_.stream));
    weight_gradient_.emplace(s_, part_, tile_rows_, scratch_, g_.weights);
    scratch_.allocate();
    std::memset(scratch_.get<char>(dys_), 0, static_cast<size_t>(part_.chunks * operand_bytes_));
    std::memset(scratch_.get<char>(coefficients_), 0, static_cast<size_t>(3 * s_.padded()) * 4);
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

  Rows inner(int64_t layer) const { return rows_of(kept_.inner, s_.compute, s_.inner_begin(layer)); }
  // The stream behind unit `unit` (never the last one, which nobody needs again); unit -1 is the input.
  Rows stream(int64_t unit) const {
    if (unit < 0) return rows_of(in_.x, s_.stream, 0);
    return rows_of(kept_.stream, s_.stream, unit * s_.rows * s_.width);
  }
  // The gradient behind the BatchNorm that reads the raw output of `layer`.
  RowsOut dz(int64_t layer) const { return {scratch_.get<char>(dz_ + (s_.plain() ? layer % 2 * dz_bytes_ : 0)), s_.compute}; }
  RowsOut carried() const { return {scratch_.get<char>(carried_), s_.stream}; }
  static Rows read(RowsOut m) { return {m.data, m.kind}; }

  const float* statistics(int64_t layer) const { return kept_.statistics.const_data_ptr<float>() + layer * 3 * s_.padded(); }
  Norm norm(int64_t layer) {
    return norm_vectors_.set(statistics(layer), s_.normed(layer), s_.padded(), data_or_null(in_.gammas, layer),
                             data_or_null(in_.betas, layer));
  }

  template <class T>
  T* of_chunk(int64_t offset, int64_t bytes, int64_t chunk) const {
    return scratch_.get<T>(offset + chunk * bytes);
  }

  // ------------------------------------------------------------------------------------------------ the steps of a layer

  // Gradient of the raw output of `layer` from `dz`, the gradient behind the BatchNorm `layer_norm` that reads it.
  BackwardPrologue from_norm(int64_t layer_norm, Rows source_dz, Rows r) const {
    BackwardPrologue p = unnormed(s_.normed(layer_norm));
    p.dz = source_dz;
    p.r = r;
    p.mean = statistics(layer_norm) + kMean * s_.padded();
    p.c1 = scratch_.get<float>(coefficients_);
    p.c2 = p.c1 + s_.padded();
    p.c3 = p.c2 + s_.padded();
    return p;
  }
  BackwardPrologue unnormed(int64_t width) const {
    BackwardPrologue p{};
    p.width = width;
    p.ld_operand = s_.operand_stride();
    return p;
  }

  BackwardPrologue gradient_of_raw(int64_t layer) {
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

  // What the layer read, as in the forward pass.
  Prologue operand_again(int64_t layer) {
    Prologue p{};
    p.width = s_.in(layer);
    p.activation = s_.activation;
    p.slope = s_.slope;
    p.ld_operand = s_.operand_stride();
    p.activate = s_.order == Order::pre || !s_.first_of_unit(layer);
    if (s_.first_of_unit(layer)) {
      p.source = stream(s_.unit(layer) - 1);
    } else {
      p.source = inner(layer - 1);
    }
    if (s_.order == Order::pre) {
      p.norm = norm_;
    } else if (!s_.first_of_unit(layer)) {
      p.norm = norm_;
    }
    return p;
  }

  BackwardEpilogue before_layer(int64_t layer) {
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
        p.out = rows_out(g_.x, s_.stream, 0);
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
        p.out = rows_out(g_.x, s_.stream, 0);
      } else {
        p.r = inner(layer - 1);
        p.residual = stream(s_.unit(layer) - 2);
      }
    }
    return p;
  }

  void run_layer(int64_t layer, bool further, int64_t pending) {
    const int64_t normed = s_.order == Order::pre ? layer : layer - 1;
    norm_ = normed >= 0 ? norm(normed) : Norm{};
    const BackwardPrologue before = gradient_of_raw(layer);
    const Prologue again = operand_again(layer);
    const bool want_weight = needs_.weights[layer], want_bias = needs_.biases[layer];
    const BackwardEpilogue after = further ? before_layer(layer) : BackwardEpilogue{};
    part_.for_chunks([&](int64_t chunk) {
      if (pending >= 0) finish_weight(pending, chunk);
      float* bias_sum = nullptr;
      if (want_bias) {
        bias_sum = scratch_.get<float>(bias_sums_) + chunk * s_.padded();
        std::memset(bias_sum, 0, static_cast<size_t>(s_.padded()) * 4);
      }
      const RowsOut dy{of_chunk<char>(dys_, operand_bytes_, chunk), s_.compute};
      for (int64_t t = part_.first_tile(chunk); t < part_.first_tile(chunk + 1); ++t) {
        gradient_tile(before, t, dy, bias_sum);
        if (want_weight) {
          source_tile(again, t, weight_gradient_->operand(layer, chunk, t));
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

  void gradient_tile(BackwardPrologue p, int64_t tile, RowsOut dy, float* bias_sum) const {
    const int64_t offset = part_.begin(tile) * p.width;
    p.rows = part_.count(tile);
    p.dz = at_offset(p.dz, offset);
    p.r = at_offset(p.r, offset);
    p.carried = at_offset(p.carried, offset);
    p.carried_out = at_offset(p.carried_out, offset);
    p.operand = dy;
    p.column_sum = bias_sum;
    k_.backward_prologue(p);
    clear_padding(dy, p.rows);
  }

  void source_tile(Prologue p, int64_t tile, RowsOut a) const {
    p.rows = part_.count(tile);
    p.source = at_offset(p.source, part_.begin(tile) * p.width);
    p.operand = a;
    k_.prologue(p);
    clear_padding(a, p.rows);
  }

  void input_gradient(int64_t layer, int64_t chunk, int64_t tile, BackwardEpilogue p) const {
    const BackwardEpilogue whole = p;
    const int64_t reduced = s_.compute == Kind::f32 ? s_.out(layer) : round_up(s_.out(layer), 2);
    float* const strip = of_chunk<float>(strips_, strip_bytes_, chunk);
    p.rows = part_.count(tile);
    p.strip = strip;
    for (int64_t panel = 0; panel < Shape::panels(p.width); ++panel) {
      multiply(s_.compute, padded_rows(p.rows), reduced, of_chunk<char>(dys_, operand_bytes_, chunk), s_.operand_stride(),
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
    p.sum_dz = scratch_.get<float>(sums_dz_) + tile * s_.padded() + column;
    p.sum_dz_xhat = scratch_.get<float>(sums_dz_xhat_) + tile * s_.padded() + column;
  }

  // --------------------------------------------------------------------------------------------- both ends of the stack

  // Post-activation: the gradient of the last unit's sum, from the gradient of its activation.
  void end_of_post() {
    BackwardEpilogue whole{};
    whole.width = s_.width;
    whole.activation = s_.activation;
    whole.slope = s_.slope;
    whole.norm = norm(s_.layers - 1);
    whole.r = inner(s_.layers - 1);
    whole.residual = stream(s_.units() - 2);
    whole.carried = stream_gradient_;
    whole.out = carried();
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

  // Pre-activation: the gradient of the input, behind the first BatchNorm and along the stream.
  void end_of_pre() {
    BackwardPrologue whole = from_norm(0, read(dz(-1)), stream(-1));
    whole.carried = stream_gradient_;
    whole.carried_out = rows_out(g_.x, s_.stream, 0);
    part_.for_chunks([&](int64_t chunk) {
      for (int64_t t = part_.first_tile(chunk); t < part_.first_tile(chunk + 1); ++t) {
        BackwardPrologue p = whole;
        const int64_t offset = part_.begin(t) * s_.width;
        p.rows = part_.count(t);
        p.dz = at_offset(p.dz, offset);
        p.r = at_offset(p.r, offset);
        p.carried = at_offset(p.carried, offset);
        p.carried_out = at_offset(p.carried_out, offset);
        k_.backward_prologue(p);
      }
    });
  }

  // --------------------------------------------------------------------------------------------------- sums over the rows

  // Column sums behind BatchNorm `layer`: its parameters' gradients, and the coefficients of its input's.
  void finish_sums(int64_t layer) {
    double* sum = scratch_.get<double>(totals_);
    double* sum_xhat = sum + s_.padded();
    const int64_t width = s_.normed(layer);
    k_.sum_tiles(scratch_.get<float>(sums_dz_), part_.tiles, s_.padded(), width, sum);
    k_.sum_tiles(scratch_.get<float>(sums_dz_xhat_), part_.tiles, s_.padded(), width, sum_xhat);
    if (needs_.norms[layer]) {
      float* beta = g_.betas.data_ptr<float>() + s_.vectors_before(layer);
      float* gamma = g_.gammas.data_ptr<float>() + s_.vectors_before(layer);
      for (int64_t c = 0; c < width; ++c) {
        beta[c] = static_cast<float>(sum[c]);
        gamma[c] = static_cast<float>(sum_xhat[c]);
      }
    }
    const float* rstd = statistics(layer) + kRstd * s_.padded();
    const float* gamma = data_or_null(in_.gammas, layer);
    float* c1 = scratch_.get<float>(coefficients_);
    float* c2 = c1 + s_.padded();
    float* c3 = c2 + s_.padded();
    // Running statistics do not depend on the rows: then dy = scale * dz.
    const double share = in_.batch_statistics ? 1.0 / static_cast<double>(s_.rows) : 0.0;
    for (int64_t c = 0; c < width; ++c) {
      c1[c] = gamma == nullptr ? rstd[c] : gamma[c] * rstd[c];
      c2[c] = static_cast<float>(sum[c] * share);
      c3[c] = static_cast<float>(rstd[c] * sum_xhat[c] * share);
    }
  }

  void finish_bias(int64_t layer) {
    double* sum = scratch_.get<double>(totals_);
    k_.sum_tiles(scratch_.get<float>(bias_sums_), part_.chunks, s_.padded(), s_.out(layer), sum);
    float* bias = g_.biases.data_ptr<float>() + s_.vectors_before(layer);
    for (int64_t c = 0; c < s_.out(layer); ++c) bias[c] = static_cast<float>(sum[c]);
  }

  const Shape s_;
  const Inputs& in_;
  const ForwardResult& kept_;
  const at::Tensor gradient_;
  const Needs& needs_;
  const Partition part_;
  NormVectors norm_vectors_;
  PackedWeights packed_;
  const Kernels& k_;
  Scratch scratch_;
  Norm norm_;
  Rows stream_gradient_ = rows_of(gradient_, s_.output(), 0);
  int64_t dz_bytes_, tile_rows_, operand_bytes_, strip_bytes_;
  int64_t dys_, strips_, bias_sums_, sums_dz_, sums_dz_xhat_, coefficients_, totals_, dz_, carried_;
  Gradients g_;
  std::optional<WeightGradient> weight_gradient_;
};

}  // namespace

Gradients backward(const Shape& shape, const Inputs& inputs, const ForwardResult& kept, const at::Tensor& gradient,
                   const Needs& needs, const Gradients* into) {
  return BackwardPass(shape, inputs, kept, gradient, needs, into).run();
}

}  // namespace rvae::cpu::stack
