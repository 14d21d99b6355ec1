// A frozen network, from rows to scores in one call: a thread takes a tile of rows through every layer, and the tile's
// operands, residual stream and strips stay in its core's cache; nothing of the size of the batch is written unless it is
// asked for. BatchNorms are folded and weights packed beforehand (rvae_fast/scorer.py builds the program).
//
// The op has no state, so any number of threads may score at once with one program. What is computed for a row does not
// depend on the rows beside it: the elementwise steps are per row, and products add up a row's terms in one order however
// many rows there are (brgemm does; where torch has none, our own kernel does).
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <pthread.h>

#include <atomic>
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

// Whether the fp32 products that torch carries treat a row alone as they treat it among others. A plain GEMM, which is
// what they are where there are no micro-kernels, has other ways for a handful of rows.
bool rows_are_independent() {
  static const bool independent = [] {
    constexpr int64_t rows = 96, k = 203;
    std::vector<float> a(rows * k), b(k * kPanel), all(rows * kPanel), few(rows * kPanel);
    uint32_t state = 1;
    const auto random = [&state] { return static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-23f - 1.0f; };
    for (float& value : a) value = random();
    for (float& value : b) value = random();
    multiply(Kind::f32, rows, k, a.data(), k, b.data(), kPanel, all.data(), kPanel, false);
    for (const int64_t n : {1, 2, 3, 4, 8, 12, 40}) {
      multiply(Kind::f32, n, k, a.data(), k, b.data(), kPanel, few.data(), kPanel, false);
      if (std::memcmp(few.data(), all.data(), n * kPanel * sizeof(float)) != 0) return false;
    }
    return true;
  }();
  return independent;
}

// strip[rows, 32] = operand[rows, reduced] * panel[reduced, 32]; there is room for four rows more than there are.
void product(Kind kind, int64_t rows, int64_t reduced, const void* operand, int64_t ld, const uint32_t* panel, float* strip) {
  if (kind == Kind::f32 && !rows_are_independent()) {
    return kernels().score_product(rows, reduced, static_cast<const float*>(operand), ld, reinterpret_cast<const float*>(panel),
                                   strip);
  }
  multiply(kind, rows <= 4 ? rows : padded_rows(rows), reduced, operand, ld, panel, kPanel, strip, kPanel, /*add=*/false);
}

// After a fork OpenMP's threads are gone and its next parallel region would wait for them for ever: a child scores alone.
std::atomic<bool> forked{false};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

template <class F>
void for_chunks(const Partition& part, F f) {
  if (!forked) return part.for_chunks(f);
  for (int64_t chunk = 0; chunk < part.chunks; ++chunk) f(chunk);
}

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

  // The products alone, of whatever is in the operands: what a benchmark holds the rest against.
  void run_products(int64_t rows) {
    for (int64_t s = 1; s < n_.steps; ++s) {
      const int64_t in = n_.field(s, kIn), reduced = n_.kind == Kind::f32 ? in : round_up(in, 2);
      for (int64_t panel = 0; panel * kPanel < n_.field(s, kOut); ++panel) {
        product(n_.kind, rows, reduced, scratch_.get<char>(operands_[(s + 1) % 2]), stride_,
                n_.weights + n_.field(s, kWeight) + panel * panel_words(in, n_.kind), scratch_.get<float>(strip_));
      }
    }
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
        product(n_.kind, rows, reduced, operand, stride_, panel, strip);
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
    for_chunks(part, [&](int64_t chunk) {
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

// The products of `score` alone, for `rows` rows that are all zero: the floor that the benchmarks name.
void score_products(const at::Tensor& program, const at::Tensor& weights, int64_t rows, bool bf16) {
  Network n{};
  n.program = program.const_data_ptr<int64_t>();
  n.steps = program.size(0);
  n.weights = reinterpret_cast<const uint32_t*>(weights.const_data_ptr<int32_t>());
  n.kind = bf16 ? Kind::bf16 : Kind::f32;
  const Partition part(rows, kTileRows);
  for_chunks(part, [&](int64_t chunk) {
    Tile tile(n, round_up(part.most_rows(), 4));
    for (int64_t t = part.first_tile(chunk); t < part.first_tile(chunk + 1); ++t) tile.run_products(part.count(t));
    release_products(n.kind);
  });
}

// The words that `score` reads of a network's weights [out, in], one after another; in huge pages, because scoring one row
// is reading them all.
at::Tensor score_pack(at::TensorList matrices, bool bf16) {
  const Kind kind = bf16 ? Kind::bf16 : Kind::f32;
  const auto words_of = [kind](const at::Tensor& w) { return round_up(w.size(0), kPanel) / kPanel * panel_words(w.size(1), kind); };
  int64_t total = 0, most = 0;
  for (const at::Tensor& w : matrices) {
    TORCH_CHECK_VALUE(w.dim() == 2 && w.scalar_type() == at::kFloat, "score_pack: weights must be float32 matrices");
    total += words_of(w);
    most = std::max(most, panel_words(w.size(1), kind));
  }
  at::Tensor packed = empty_large({total}, at::TensorOptions().dtype(at::kInt)).zero_();
  auto* words = reinterpret_cast<uint32_t*>(packed.data_ptr<int32_t>());
  std::vector<uint32_t> scratch(most);
  for (const at::Tensor& matrix : matrices) {
    const at::Tensor w = matrix.contiguous();
    const int64_t out = w.size(0), in = w.size(1);
    for (int64_t panel = 0; panel * kPanel < out; ++panel, words += panel_words(in, kind)) {
      pack_forward(w.const_data_ptr<float>(), out, in, panel, kind, words, scratch.data());
    }
  }
  return packed;
}

// A number that changes when a tensor gets another place in memory, when autograd counts a write to it, and, likely, when
// it is written past that count: up to 16 of its words, evenly spread, are part of it.
int64_t score_state(at::TensorList tensors) {
  constexpr int64_t kSampled = 16;
  uint64_t state = 0xcbf29ce484222325u;
  const auto mix = [&state](uint64_t value) { state = (state ^ value) * 0x9e3779b97f4a7c15u, state ^= state >> 32; };
  for (const at::Tensor& t : tensors) {
    mix(reinterpret_cast<uintptr_t>(t.const_data_ptr()));
    mix(t.unsafeGetTensorImpl()->version_counter().current_version());
    if (!t.is_cpu() || !t.is_contiguous()) continue;
    const auto* bytes = static_cast<const char*>(t.const_data_ptr());
    const int64_t words = static_cast<int64_t>(t.nbytes()) / 4, sampled = std::min(words, kSampled);
    for (int64_t i = 0; i < sampled; ++i) {
      uint32_t word;
      std::memcpy(&word, bytes + words * i / sampled * 4, 4);
      mix(word);
    }
  }
  return static_cast<int64_t>(state);
}

}  // namespace

TORCH_LIBRARY_IMPL(rvae_fast, CPU, m) {
  m.impl("score", score);
}

TORCH_LIBRARY_IMPL(rvae_fast, CompositeExplicitAutograd, m) {
  m.impl("score_products", score_products);
  m.impl("score_pack", score_pack);
  m.impl("score_state", score_state);
}

}  // namespace rvae::cpu::stack
