// Where the encoder of a frozen network differs for rows and for their reconstructions (RaPP's pathway, rvae_fast/pathway.py):
// a tile goes through the network, and what that makes of it through the encoder once more. The first pass leaves its error
// and its side of the differences, so that one and a half passes do. SAP is summed up as the tiles pass; the differences are
// written only if they are asked for, and so is what one step of the first pass ends with, the rows' features.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string_view>
#include <vector>

#include "cpu/score_tile.h"

namespace rvae::cpu::stack {

namespace {

// A row of `taps`: step, column, width, before.
enum TapField : int64_t { kStep, kColumn, kWidth, kBefore, kTapFields };

// The taps by step, checked against the network; and of all of them the number of columns.
int64_t place_taps(const at::Tensor& taps, const Network& n, std::vector<Tap>& by_step) {
  TORCH_CHECK_VALUE(taps.scalar_type() == at::kLong && taps.dim() == 2 && taps.size(1) == kTapFields && taps.is_contiguous(),
                    "score_pathway: taps must be int64 rows of step, column, width, before");
  by_step.assign(static_cast<size_t>(n.steps), {});
  int64_t columns = 0;
  for (int64_t i = 0; i < taps.size(0); ++i) {
    const int64_t* f = taps.const_data_ptr<int64_t>() + i * kTapFields;
    TORCH_CHECK_VALUE(f[kStep] >= 0 && f[kStep] < n.steps && by_step[f[kStep]].column < 0 && f[kColumn] == columns &&
                          f[kWidth] > 0 && f[kWidth] <= n.field(f[kStep], kOut),
                      "score_pathway: the taps are not ones of this network, side by side");
    by_step[f[kStep]] = {f[kColumn], f[kWidth], f[kBefore] != 0};
    columns += f[kWidth];
  }
  return columns;
}

struct Differences {
  int64_t input, columns;  // of the input (none if it does not count), and behind it of the taps

  // Of one row; writes them to `to` unless that is nullptr, and returns the sum of their squares.
  double row(const float* x, const float* x_hat, const float* seen, const float* seen_hat, float* to) const {
    return part(x, x_hat, input, to) + part(seen, seen_hat, columns, to == nullptr ? nullptr : to + input);
  }

 private:
  static double part(const float* a, const float* b, int64_t count, float* to) {
    double sum = 0.0;
    for (int64_t c = 0; c < count; ++c) {
      const float d = b[c] - a[c];
      if (to != nullptr) to[c] = d;
      sum += static_cast<double>(d) * d;
    }
    return sum;
  }
};

// error [n]; latent [n, latent]; SAP, the sum of the squared differences [n] fp64; the differences [n, input and taps]; the
// value of step `value_step` in the first pass [n, value_width], of none if that is 0.
std::vector<at::Tensor> score_pathway(const at::Tensor& x, const at::Tensor& program, const at::Tensor& weights,
                                      const at::Tensor& vectors, const at::Tensor& taps, int64_t latent, bool variational,
                                      double low, double high, std::string_view likelihood, int64_t activation, double slope,
                                      bool bf16, bool include_input, bool want_latent, bool want_differences, int64_t value_step,
                                      int64_t value_width) {
  const Network n = make_network(program, weights, vectors, latent, variational, low, high, likelihood, activation, slope, bf16);
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) == n.in_features, "score_pathway: x must have shape [batch, ", n.in_features,
                    "], got ", x.sizes());
  std::vector<Tap> by_step;
  const int64_t columns = place_taps(taps, n, by_step);
  std::vector<Tap> value_by_step(static_cast<size_t>(n.steps));
  if (value_width > 0) {
    TORCH_CHECK_VALUE(value_step >= 0 && value_step < n.steps && value_width <= n.field(value_step, kOut),
                      "score_pathway: this network has no step ", value_step, " of width ", value_width);
    value_by_step[value_step] = {0, value_width, false};
  }
  const Differences differences{include_input ? n.in_features : 0, columns};
  const int64_t width = differences.input + columns;

  const at::Tensor rows = fp32_rows(x);
  const int64_t count = rows.size(0);
  const at::Tensor error = at::empty({count}, rows.options()), sap = at::empty({count}, rows.options().dtype(at::kDouble)),
                   code = at::empty({want_latent ? count : 0, latent}, rows.options()),
                   written = at::empty({want_differences ? count : 0, width}, rows.options()),
                   values = at::empty({value_width > 0 ? count : 0, value_width}, rows.options());
  if (count > 0) {
    const Partition part(count, n.tile_rows(), n.row_work());
    for_chunks(part, [&](int64_t chunk) {
      const int64_t most = part.most_rows();
      Tile tile(n, most);
      std::vector<float> x_hat(most * n.in_features), seen(most * columns), seen_hat(most * columns);
      const Taps first{by_step.data(), seen.data(), columns}, second{by_step.data(), seen_hat.data(), columns};
      for (int64_t t = part.first_tile(chunk); t < part.first_tile(chunk + 1); ++t) {
        const int64_t begin = part.begin(t), size = part.count(t);
        const float* own = rows.const_data_ptr<float>() + begin * n.in_features;
        Outputs out{};
        out.error = error.data_ptr<float>() + begin;
        out.latent = want_latent ? code.data_ptr<float>() + begin * latent : nullptr;
        out.reconstruction = x_hat.data();
        const Taps value{value_by_step.data(), values.data_ptr<float>() + begin * value_width, value_width};
        tile.run(own, size, out, &first, value_width > 0 ? &value : nullptr);
        tile.run_encoder(x_hat.data(), size, second);
        for (int64_t r = 0; r < size; ++r) {
          sap.data_ptr<double>()[begin + r] =
              differences.row(own + r * n.in_features, x_hat.data() + r * n.in_features, seen.data() + r * columns,
                              seen_hat.data() + r * columns,
                              want_differences ? written.data_ptr<float>() + (begin + r) * width : nullptr);
        }
      }
      release_products(n.kind);
    });
  }
  return {error, code, sap, written, values};
}

}  // namespace

TORCH_LIBRARY_IMPL(rvae_fast, CPU, m) {
  m.impl("score_pathway", score_pathway);
}

}  // namespace rvae::cpu::stack
