// Forward pass of a stack: one pass over the rows a layer.
//
//   pre-activation   operand = act(norm(source));  out = operand W^T + b (+ stream, at the end of a unit)
//   post-activation  operand = act(norm(source)) inside a unit; at its start the stream is first brought up to date,
//                    stream = act(norm(source) + stream), operand = stream;  out = operand W^T + b
//   plain            operand = act(norm(source)), at the start the input itself;  out = operand W^T + b
//
// `source` is the raw output of the layer before. The column statistics of what a layer writes are gathered tile by tile in
// its epilogue and merged before the next layer starts.
#include <ATen/ops/zeros.h>

#include <cmath>
#include <cstring>

#include "cpu/stack_pass.h"

namespace rvae::cpu::stack {

namespace {

at::ScalarType scalar_type(Kind kind) {
  return kind == Kind::f32 ? at::kFloat : at::kBFloat16;
}

class ForwardPass {
 public:
  ForwardPass(const Shape& shape, const Inputs& inputs, bool keep)
      : s_(shape), in_(inputs), keep_(keep), part_(shape.rows, shape.tile_rows(), shape.row_work()), norm_vectors_(shape.padded()),
        packed_(inputs.weights, shape, /*forward=*/true), k_(kernels()) {
    const auto options = in_.x.options();
    const int64_t streams = keep_ ? s_.units() - 1 : 0;
    result_.out = empty_large({s_.rows, s_.out(s_.layers - 1)}, options.dtype(scalar_type(s_.output())));
    result_.stream = empty_large({streams, s_.rows, s_.width}, options);
    // In a plain stack, whose widths differ, what a layer reads and what it writes must not share memory.
    const int64_t one = s_.rows * s_.width, shared = s_.plain() ? std::min<int64_t>(2, s_.norms()) * one : std::min(one, s_.inner_size());
    const int64_t inner = keep_ ? s_.inner_size() : shared;
    result_.inner = empty_large({inner}, options.dtype(scalar_type(s_.compute)));
    if (!s_.plain()) result_.inner = result_.inner.view({inner / one, s_.rows, s_.width});
    result_.statistics = at::zeros({s_.norms(), 3, s_.padded()}, options.dtype(at::kFloat));

    const int64_t tile = round_up(part_.most_rows(), kRowBlock);
    operand_bytes_ = tile * s_.operand_stride() * size_of(s_.compute);
    strip_bytes_ = tile * kPanel * 4;
    operands_ = scratch_.add(part_.chunks * round_up(operand_bytes_, kAlignment));
    strips_ = scratch_.add(part_.chunks * round_up(strip_bytes_, kAlignment));
    means_ = scratch_.add(part_.tiles * s_.padded() * 4);
    shifts_ = scratch_.add(part_.tiles * s_.padded() * 4);
    m2s_ = scratch_.add(part_.tiles * s_.padded() * 4);
    merged_ = scratch_.add(2 * s_.padded() * 8);
    scratch_.allocate();
    // Rows and columns of an operand that no row of the batch fills take part in products: let them be numbers.
    std::memset(scratch_.get<char>(operands_), 0, static_cast<size_t>(part_.chunks * round_up(operand_bytes_, kAlignment)));
    for (int64_t t = 0; t < part_.tiles; ++t) counts_.push_back(part_.count(t));
  }

  ForwardResult run() {
    if (!in_.batch_statistics) use_running_statistics();
    if (s_.order == Order::pre) {
      if (in_.batch_statistics) gather(rows_of(in_.x, s_.stream, 0), 0);
      for (int64_t layer = 0; layer < s_.layers; ++layer) pre_layer(layer);
    } else if (s_.order == Order::post) {
      for (int64_t layer = 0; layer < s_.layers; ++layer) post_layer(layer);
      finish_post();
    } else {
      for (int64_t layer = 0; layer < s_.layers; ++layer) plain_layer(layer);
    }
    return result_;
  }

 private:
  RowsOut inner(int64_t layer) {
    const int64_t shared = s_.plain() ? layer % 2 * s_.rows * s_.width : 0;
    return rows_out(result_.inner, s_.compute, keep_ ? s_.inner_begin(layer) : shared);
  }
  // The stream behind unit `unit`; unit -1 is the input.
  RowsOut stream(int64_t unit) {
    if (unit < 0) return rows_out(in_.x, s_.stream, 0);
    if (unit == s_.units() - 1 || !keep_) return rows_out(result_.out, s_.stream, 0);
    return rows_out(result_.stream, s_.stream, unit * s_.rows * s_.width);
  }
  static Rows read(RowsOut m) { return {m.data, m.kind}; }

  float* statistics(int64_t layer) { return result_.statistics.data_ptr<float>() + layer * 3 * s_.padded(); }
  Norm norm(int64_t layer) {
    return norm_vectors_.set(statistics(layer), s_.normed(layer), s_.padded(), data_or_null(in_.gammas, layer),
                             data_or_null(in_.betas, layer));
  }

  void pre_layer(int64_t layer) {
    const int64_t unit = s_.unit(layer);
    Prologue before = prologue(layer);
    before.source = read(s_.first_of_unit(layer) ? stream(unit - 1) : inner(layer - 1));
    before.norm = norm(layer);
    before.activate = true;
    const bool last = s_.last_of_unit(layer);
    run_layer(layer, before, last ? read(stream(unit - 1)) : Rows{}, last ? stream(unit) : inner(layer),
              layer + 1 < s_.layers ? layer + 1 : -1);
  }

  void plain_layer(int64_t layer) {
    const bool last = layer + 1 == s_.layers;
    Prologue before = prologue(layer);
    if (layer == 0) {
      before.source = rows_of(in_.x, s_.stream, 0);
    } else {
      before.source = read(inner(layer - 1));
      before.norm = norm(layer - 1);
      before.activate = true;
    }
    run_layer(layer, before, Rows{}, last ? rows_out(result_.out, s_.output(), 0) : inner(layer), last ? -1 : layer);
  }

  void post_layer(int64_t layer) {
    const int64_t unit = s_.unit(layer);
    Prologue before = prologue(layer);
    if (layer == 0) {
      before.source = read(stream(-1));
    } else {
      before.source = read(inner(layer - 1));
      before.norm = norm(layer - 1);
      before.activate = true;
      if (s_.first_of_unit(layer)) {
        before.residual = read(stream(unit - 2));
        before.stream = stream(unit - 1);
      }
    }
    run_layer(layer, before, Rows{}, inner(layer), layer);
  }

  void finish_post() {
    Prologue after = prologue(s_.layers - 1);
    after.source = read(inner(s_.layers - 1));
    after.norm = norm(s_.layers - 1);
    after.activate = true;
    after.residual = read(stream(s_.units() - 2));
    after.stream = stream(s_.units() - 1);
    part_.for_chunks([&](int64_t chunk) {
      for (int64_t t = part_.first_tile(chunk); t < part_.first_tile(chunk + 1); ++t) k_.prologue(tile_of(after, t, {}));
    });
  }

  Prologue prologue(int64_t layer) const {
    Prologue p{};
    p.width = s_.in(layer);
    p.activation = s_.activation;
    p.slope = s_.slope;
    p.ld_operand = s_.operand_stride();
    return p;
  }

  Prologue tile_of(Prologue p, int64_t tile, RowsOut operand) const {
    const int64_t offset = part_.begin(tile) * p.width;
    p.rows = part_.count(tile);
    p.source = at_offset(p.source, offset);
    p.residual = at_offset(p.residual, offset);
    p.stream = at_offset(p.stream, offset);
    p.operand = operand;
    return p;
  }

  // One layer for all rows. `normed_by` is the layer whose BatchNorm reads `out`, or -1.
  void run_layer(int64_t layer, const Prologue& before, Rows residual, RowsOut out, int64_t normed_by) {
    const bool moments = normed_by >= 0 && in_.batch_statistics;
    const float* bias = data_or_null(in_.biases, layer);
    const int64_t width = s_.out(layer);
    const int64_t reduced = product_terms(s_.in(layer), s_.compute);
    part_.for_chunks([&](int64_t chunk) {
      const RowsOut operand{scratch_.get<char>(operands_ + chunk * round_up(operand_bytes_, kAlignment)), s_.compute};
      for (int64_t t = part_.first_tile(chunk); t < part_.first_tile(chunk + 1); ++t) {
        k_.prologue(tile_of(before, t, operand));
        Epilogue after{};
        after.rows = part_.count(t);
        after.width = width;
        after.strip = strip(chunk);
        for (int64_t panel = 0; panel < Shape::panels(width); ++panel) {
          const int64_t column = panel * kPanel;
          const int64_t offset = part_.begin(t) * width + column;
          multiply(s_.compute, product_rows(after.rows, s_.compute), reduced, operand.data, s_.operand_stride(), packed_.panel(layer, panel),
                   kPanel, strip(chunk), kPanel, /*add=*/false);
          after.columns = std::min(kPanel, width - column);
          after.bias = bias == nullptr ? nullptr : bias + column;
          after.residual = at_offset(residual, offset);
          after.out = at_offset(out, offset);
          if (moments) set_moments(after, t, column);
          k_.epilogue(after);
        }
      }
      release_products(s_.compute);
    });
    if (moments) merge(normed_by);
  }

  // Statistics of rows that are already there: the stack's input.
  void gather(Rows source, int64_t normed_by) {
    part_.for_chunks([&](int64_t chunk) {
      Epilogue p{};
      p.width = s_.width;
      p.strip = strip(chunk);
      for (int64_t t = part_.first_tile(chunk); t < part_.first_tile(chunk + 1); ++t) {
        p.rows = part_.count(t);
        for (int64_t column = 0; column < s_.width; column += kPanel) {
          p.columns = std::min(kPanel, s_.width - column);
          k_.load_strip(at_offset(source, part_.begin(t) * s_.width + column), p.rows, p.columns, s_.width, strip(chunk));
          set_moments(p, t, column);
          k_.epilogue(p);
        }
      }
    });
    merge(normed_by);
  }

  float* strip(int64_t chunk) const { return scratch_.get<float>(strips_ + chunk * round_up(strip_bytes_, kAlignment)); }

  void set_moments(Epilogue& p, int64_t tile, int64_t column) const {
    p.mean = scratch_.get<float>(means_) + tile * s_.padded() + column;
    p.shift = scratch_.get<float>(shifts_) + tile * s_.padded() + column;
    p.m2 = scratch_.get<float>(m2s_) + tile * s_.padded() + column;
  }

  void merge(int64_t layer) {
    double* mean = scratch_.get<double>(merged_);
    double* m2 = mean + s_.padded();
    const int64_t width = s_.normed(layer);
    k_.merge_moments(counts_.data(), scratch_.get<float>(means_), scratch_.get<float>(shifts_), scratch_.get<float>(m2s_),
                     part_.tiles, s_.padded(), width, mean, m2);
    float* out = statistics(layer);
    const double n = static_cast<double>(s_.rows);
    for (int64_t c = 0; c < width; ++c) {
      out[kMean * s_.padded() + c] = static_cast<float>(mean[c]);
      out[kRstd * s_.padded() + c] = static_cast<float>(1.0 / std::sqrt(m2[c] / n + in_.eps));
      out[kVariance * s_.padded() + c] = static_cast<float>(m2[c] / (n - 1.0));
    }
  }

  void use_running_statistics() {
    for (int64_t layer = 0; layer < s_.norms(); ++layer) {
      float* out = statistics(layer);
      const float* mean = in_.running_means[layer].const_data_ptr<float>();
      const float* variance = in_.running_vars[layer].const_data_ptr<float>();
      for (int64_t c = 0; c < s_.normed(layer); ++c) {
        out[kMean * s_.padded() + c] = mean[c];
        out[kRstd * s_.padded() + c] = static_cast<float>(1.0 / std::sqrt(static_cast<double>(variance[c]) + in_.eps));
        out[kVariance * s_.padded() + c] = variance[c];
      }
    }
  }

  const Shape s_;
  const Inputs& in_;
  const bool keep_;
  const Partition part_;
  NormVectors norm_vectors_;
  PackedWeights packed_;
  const Kernels& k_;
  Scratch scratch_;
  int64_t operand_bytes_, strip_bytes_, operands_, strips_, means_, shifts_, m2s_, merged_;
  std::vector<int64_t> counts_;
  ForwardResult result_;
};

}  // namespace

ForwardResult forward(const Shape& shape, const Inputs& inputs, bool keep) {
  return ForwardPass(shape, inputs, keep).run();
}

}  // namespace rvae::cpu::stack
