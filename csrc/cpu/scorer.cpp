// A frozen network, from rows to scores in one call: a thread takes a tile of rows through every layer, and the tile's
// operands, residual stream and strips stay in its core's cache; nothing of the size of the batch is written unless it is
// asked for. BatchNorms are folded and weights packed beforehand (rvae_fast/freeze.py builds the program).
//
// The op has no state, so any number of threads may score at once with one program.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <string_view>
#include <vector>

#include "cpu/stack_pass.h"

namespace rvae::cpu::stack {

namespace {

// A row of the program. The first step has no product: it loads the input. Offsets are -1 where there is nothing.
enum Field : int64_t {
  kIn, kOut, kWeight, kBias, kScale, kShift, kAddStream, kActivateFirst, kStoreStream, kActivateLast, kIsCode, kFields
};

struct Network {
  const int64_t* program;
  int64_t steps;
  const uint32_t* weights;
  const float* vectors;
  int64_t in_features, latent;
  bool variational;
  double low, high;
  int likelihood;
  Activation activation;
  float slope;
  Kind kind;

  int64_t field(int64_t step, Field f) const { return program[step * kFields + f]; }
  const float* vector(int64_t step, Field f) const { return field(step, f) < 0 ? nullptr : vectors + field(step, f); }
};

struct Outputs {
  float *error, *kld, *latent, *reconstruction, *feature_error;  // nullptr where not asked for; `error` always
};

// What one thread needs for a tile.
class Tile {
 public:
  Tile(const Network& network, int64_t rows) : n_(network) {
    int64_t widest = 0;
    for (int64_t s = 0; s < n_.steps; ++s) widest = std::max(widest, n_.field(s, kOut));
    stride_ = round_up(widest, kPanel) + 32;  // off the powers of two
    for (auto& offset : operands_) offset = scratch_.add(rows * stride_ * size_of(n_.kind));
    stream_ = scratch_.add(rows * stride_ * 4);
    strip_ = scratch_.add(rows * kPanel * 4);
    code_ = scratch_.add(rows * stride_ * 4);
    scratch_.allocate();
    // Rows that pad a tile take part in products: let them be numbers.
    for (const auto offset : operands_) std::memset(scratch_.get<char>(offset), 0, rows * stride_ * size_of(n_.kind));
  }

  void run(const float* x, int64_t rows, const Outputs& out) {
    for (int64_t r = 0; r < rows; ++r) out.error[r] = 0.0f;
    for (int64_t s = 0; s < n_.steps; ++s) step(s, x, rows, out);
  }

 private:
  void step(int64_t s, const float* x, int64_t rows, const Outputs& out) {
    const Kernels& k = kernels();
    const int64_t in = n_.field(s, kIn), width = n_.field(s, kOut);
    const bool loads = n_.field(s, kWeight) < 0, last = s + 1 == n_.steps, is_code = n_.field(s, kIsCode) != 0;
    const int64_t reduced = n_.kind == Kind::f32 ? in : round_up(in, 2);
    const char* operand = scratch_.get<char>(operands_[(s + 1) % 2]);
    char* next = scratch_.get<char>(operands_[s % 2]);
    float* strip = scratch_.get<float>(strip_);
    float* code = scratch_.get<float>(code_);
    ScoreStep p{};
    p.rows = rows;
    p.strip = strip;
    p.ld_stream = stride_;
    p.add_stream = n_.field(s, kAddStream) != 0;
    p.activate_first = n_.field(s, kActivateFirst) != 0;
    p.store_stream = n_.field(s, kStoreStream) != 0;
    p.activate_last = n_.field(s, kActivateLast) != 0;
    p.store_strip = last || is_code;
    p.activation = n_.activation;
    p.slope = n_.slope;
    p.ld_operand = stride_;
    const auto at = [](const float* vector, int64_t column) { return vector == nullptr ? nullptr : vector + column; };
    for (int64_t column = 0; column < width; column += kPanel) {
      const int64_t columns = std::min(kPanel, width - column);
      if (loads) {
        k.load_strip({x + column, Kind::f32}, rows, columns, width, strip);
      } else {
        const uint32_t* panel = n_.weights + n_.field(s, kWeight) + column / kPanel * panel_words(in, n_.kind);
        multiply(n_.kind, rows <= 4 ? rows : padded_rows(rows), reduced, operand, stride_, panel, kPanel, strip, /*add=*/false);
      }
      p.bias = at(n_.vector(s, kBias), column);
      p.scale = at(n_.vector(s, kScale), column);
      p.shift = at(n_.vector(s, kShift), column);
      p.stream = scratch_.get<float>(stream_) + column;
      p.operand = {last ? nullptr : next + column * size_of(n_.kind), n_.kind};
      k.score_step(p);
      if (is_code) {
        for (int64_t r = 0; r < rows; ++r) std::memcpy(code + r * stride_ + column, strip + r * kPanel, columns * 4);
      }
      if (last) {
        const auto place = [&](float* m) { return m == nullptr ? nullptr : m + column; };
        k.score_error({rows, columns, width, strip, x + column, n_.likelihood, out.error, place(out.feature_error),
                       place(out.reconstruction)});
      }
    }
    if (is_code) read_code(code, rows, out);
  }

  // The log variance is bounded as in rvae_fast.models.Autoencoder._encode.
  void read_code(const float* code, int64_t rows, const Outputs& out) const {
    const auto softplus = [](double v) { return v > 20.0 ? v : std::log1p(std::exp(v)); };
    for (int64_t r = 0; r < rows; ++r) {
      const float* mu = code + r * stride_;
      if (out.latent != nullptr) std::memcpy(out.latent + r * n_.latent, mu, n_.latent * 4);
      if (out.kld == nullptr) continue;
      double kld = 0.0;
      for (int64_t c = 0; n_.variational && c < n_.latent; ++c) {
        double logvar = n_.high - softplus(n_.high - mu[n_.latent + c]);
        logvar = n_.low + softplus(logvar - n_.low);
        kld += 0.5 * (static_cast<double>(mu[c]) * mu[c] + std::expm1(logvar) - logvar);
      }
      out.kld[r] = static_cast<float>(kld);
    }
  }

  const Network& n_;
  Scratch scratch_;
  int64_t stride_, operands_[2], stream_, strip_, code_;
};

std::vector<at::Tensor> score(const at::Tensor& x, const at::Tensor& program, const at::Tensor& weights, const at::Tensor& vectors,
                              int64_t latent, bool variational, double low, double high, std::string_view likelihood,
                              int64_t activation, double slope, bool bf16, bool want_kld, bool want_latent,
                              bool want_reconstruction, bool want_feature_error) {
  TORCH_CHECK(program.scalar_type() == at::kLong && program.dim() == 2 && program.size(1) == kFields && program.size(0) > 1 &&
                  program.is_contiguous() && weights.scalar_type() == at::kInt && weights.is_contiguous() &&
                  vectors.scalar_type() == at::kFloat && vectors.is_contiguous(),
              "score: the program is not one that rvae_fast.freeze made");
  Network n;
  n.program = program.const_data_ptr<int64_t>();
  n.steps = program.size(0);
  n.weights = reinterpret_cast<const uint32_t*>(weights.const_data_ptr<int32_t>());
  n.vectors = vectors.const_data_ptr<float>();
  n.in_features = n.field(0, kOut);
  n.latent = latent;
  n.variational = variational;
  n.low = low;
  n.high = high;
  n.likelihood = likelihood == "squared" ? 0 : likelihood == "absolute" ? 1 : 2;
  n.activation = static_cast<Activation>(activation);
  n.slope = static_cast<float>(slope);
  n.kind = bf16 ? Kind::bf16 : Kind::f32;
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) == n.in_features, "score: x must have shape [batch, ", n.in_features, "], got ",
                    x.sizes());
  TORCH_CHECK(!bf16 || has_bf16_products(), "score: this CPU has no bf16 products");

  const at::Tensor rows = x.to(at::kFloat).contiguous();
  const int64_t count = rows.size(0);
  const auto make = [&](bool wanted, int64_t columns) { return at::empty({wanted ? count : 0, columns}, rows.options()); };
  const at::Tensor error = at::empty({count}, rows.options()), kld = at::empty({want_kld ? count : 0}, rows.options());
  const at::Tensor code = make(want_latent, latent), reconstruction = make(want_reconstruction, n.in_features),
                   feature_error = make(want_feature_error, n.in_features);
  if (count > 0) {
    const Partition part(count, kTileRows);
    const auto at_row = [](const at::Tensor& t, bool wanted, int64_t row, int64_t columns) {
      return wanted ? t.data_ptr<float>() + row * columns : nullptr;
    };
    part.for_chunks([&](int64_t chunk) {
      Tile tile(n, round_up(part.most_rows(), 4));
      for (int64_t t = part.first_tile(chunk); t < part.first_tile(chunk + 1); ++t) {
        const int64_t row = part.begin(t);
        tile.run(rows.const_data_ptr<float>() + row * n.in_features, part.count(t),
                 {error.data_ptr<float>() + row, at_row(kld, want_kld, row, 1), at_row(code, want_latent, row, latent),
                  at_row(reconstruction, want_reconstruction, row, n.in_features),
                  at_row(feature_error, want_feature_error, row, n.in_features)});
      }
      release_products(n.kind);
    });
  }
  return {error, kld, code, reconstruction, feature_error};
}

// A weight [out, in] as the words that `score` reads.
at::Tensor score_pack(const at::Tensor& weight, bool bf16) {
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.scalar_type() == at::kFloat, "score_pack: weight must be a float32 matrix");
  const at::Tensor w = weight.contiguous();
  const Kind kind = bf16 ? Kind::bf16 : Kind::f32;
  const int64_t out = w.size(0), in = w.size(1), panels = round_up(out, kPanel) / kPanel, words_each = panel_words(in, kind);
  at::Tensor packed = at::zeros({panels * words_each}, w.options().dtype(at::kInt));
  std::vector<uint32_t> scratch(words_each);
  for (int64_t panel = 0; panel < panels; ++panel) {
    pack_forward(w.const_data_ptr<float>(), out, in, panel, kind,
                 reinterpret_cast<uint32_t*>(packed.data_ptr<int32_t>()) + panel * words_each, scratch.data());
  }
  return packed;
}

}  // namespace

TORCH_LIBRARY_IMPL(rvae_fast, CPU, m) {
  m.impl("score", score);
  m.impl("score_pack", score_pack);
}

}  // namespace rvae::cpu::stack
