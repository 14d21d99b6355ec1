// A frozen network as the native kernels see it, and what a thread needs to take a tile of rows through it.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <string_view>
#include <vector>

#include "cpu/stack_pass.h"

namespace rvae::cpu::stack {

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
  // Multiplications that a row takes.
  int64_t row_work() const {
    int64_t sum = 0;
    for (int64_t s = 1; s < steps; ++s) sum += field(s, kIn) * field(s, kOut);
    return sum;
  }
  int64_t weight_bytes(int64_t step) const { return field(step, kIn) * field(step, kOut) * size_of(kind); }
  // Values between the rows of a tile's matrices: off the powers of two.
  int64_t stride() const {
    int64_t widest = 0;
    for (int64_t s = 0; s < steps; ++s) widest = std::max(widest, field(s, kOut));
    return round_up(widest, kPanel) + 32;
  }
  // Two operands and the stream of a tile. In fp32 it is the weights, twice as large, that had better be read less often.
  int64_t tile_rows() const {
    return stack::tile_rows((2 * size_of(kind) + 4) * stride(), kind == Kind::f32 ? int64_t{1} << 21 : int64_t{1} << 20, 352);
  }
  const float* vector(int64_t step, Field f) const { return field(step, f) < 0 ? nullptr : vectors + field(step, f); }
};

// The network that a program, its weights and vectors are (rvae_fast/scorer.py makes them), checked.
Network make_network(const at::Tensor& program, const at::Tensor& weights, const at::Tensor& vectors, int64_t latent,
                     bool variational, double low, double high, std::string_view likelihood, int64_t activation, double slope,
                     bool bf16);

// strip[rows, 32] = operand[rows, reduced] * panel[reduced, 32]; there is room for whole blocks of kRowBlock rows. What it
// computes for a row does not depend on the others.
void score_product(Kind kind, int64_t rows, int64_t reduced, const void* operand, int64_t ld, const uint32_t* panel, float* strip);

// Whether this process is a fork's child: OpenMP's threads are gone, its next parallel region would wait for them for ever.
bool is_forked();

// As Partition::for_chunks; a forked child does all by itself, and one chunk may use threads of its own.
template <class F>
void for_chunks(const Partition& part, F f) {
  if (part.chunks > 1 && !is_forked()) return part.for_chunks(f);
  for (int64_t chunk = 0; chunk < part.chunks; ++chunk) f(chunk);
}

// The rows as fp32, contiguous. A forked child converts them in pieces that PyTorch does not divide among threads.
at::Tensor fp32_rows(const at::Tensor& x);

struct Outputs {
  float *error, *kld, *latent, *reconstruction, *feature_error;  // nullptr where not asked for; `error` always
};

// A value of a pass that is kept: of one step, before its addition and activation or behind them, its first `width` columns.
// They go to `column` and on; -1 for a step of which nothing is.
struct Tap {
  int64_t column = -1, width = 0;
  bool before = false;
};

struct Taps {
  const Tap* of_step;
  float* to;  // a row for each row of the tile
  int64_t ld;
};

// A handful of rows costs what reading the weights costs. So threads share the columns of a layer, as many as have so much to read that it pays
// for waking them (some 3 us, in which a core reads 64 KB).
constexpr int64_t kSharedRows = 16, kBytesOfThread = int64_t{1} << 16;

inline bool shares_columns(const Network& n, int64_t rows) {
  if (rows > kSharedRows || is_forked() || at::in_parallel_region() || at::get_num_threads() == 1) return false;
  for (int64_t s = 1; s < n.steps; ++s) {
    if (n.weight_bytes(s) >= 2 * kBytesOfThread) return true;
  }
  return false;
}

// What one thread needs for a tile; with `threads`, what they need together.
class Tile {
 public:
  Tile(const Network& network, int64_t most_rows, int64_t threads = 1) : n_(network), threads_(threads) {
    const int64_t rows = round_up(most_rows, kRowBlock);
    stride_ = n_.stride();
    for (auto& offset : operands_) offset = scratch_.add(rows * stride_ * size_of(n_.kind));
    stream_ = scratch_.add(rows * stride_ * 4);
    strip_bytes_ = rows * kPanel * 4;
    strip_ = scratch_.add(threads_ * strip_bytes_);
    errors_ = scratch_.add(threads_ == 1 ? 0 : at::divup(n_.in_features, kPanel) * rows * 4);
    code_ = scratch_.add(rows * stride_ * 4);
    scratch_.allocate();
    // Rows that pad a tile take part in products: let them be numbers.
    for (const auto offset : operands_) std::memset(scratch_.get<char>(offset), 0, rows * stride_ * size_of(n_.kind));
  }

  // The products alone, of whatever is in the operands: what a benchmark holds the rest against.
  void run_products(int64_t rows) {
    for (int64_t s = 1; s < n_.steps; ++s) {
      const int64_t in = n_.field(s, kIn), reduced = product_terms(in, n_.kind);
      const auto product = [&](int64_t panel, float* strip, float*) {
        score_product(n_.kind, rows, reduced, scratch_.get<char>(operands_[(s + 1) % 2]), stride_,
                      n_.weights + n_.field(s, kWeight) + panel * panel_words(in, n_.kind), strip);
      };
      for_panels(s, rows, nullptr, product);
    }
  }

  // `values`: of one pass besides the taps, behind additions and activations; a step may have both.
  void run(const float* x, int64_t rows, const Outputs& out, const Taps* taps = nullptr, const Taps* values = nullptr) {
    for (int64_t r = 0; r < rows; ++r) out.error[r] = 0.0f;
    for (int64_t s = 0; s < n_.steps; ++s) step(s, x, rows, out, taps, values);
  }

  // As far as the code.
  void run_encoder(const float* x, int64_t rows, const Taps& taps) {
    for (int64_t s = 0; s < n_.steps; ++s) {
      step(s, x, rows, {}, &taps, nullptr);
      if (n_.field(s, kIsCode) != 0) return;
    }
  }

 private:
  void step(int64_t s, const float* x, int64_t rows, const Outputs& out, const Taps* taps, const Taps* values) {
    const Kernels& k = kernels();
    const int64_t in = n_.field(s, kIn), width = n_.field(s, kOut);
    const bool loads = n_.field(s, kWeight) < 0, last = s + 1 == n_.steps, is_code = n_.field(s, kIsCode) != 0;
    const int64_t reduced = product_terms(in, n_.kind);
    const char* operand = scratch_.get<char>(operands_[(s + 1) % 2]);
    char* next = scratch_.get<char>(operands_[s % 2]);
    float* code = scratch_.get<float>(code_);
    ScoreStep whole{};
    whole.rows = rows;
    whole.ld_stream = stride_;
    whole.add_stream = n_.field(s, kAddStream) != 0;
    whole.activate_first = n_.field(s, kActivateFirst) != 0;
    whole.store_stream = n_.field(s, kStoreStream) != 0;
    whole.activate_last = n_.field(s, kActivateLast) != 0;
    const Tap tap = taps == nullptr ? Tap{} : taps->of_step[s], value = values == nullptr ? Tap{} : values->of_step[s];
    const auto keep = [&](const float* strip, const Taps& of, const Tap& own, int64_t column, const float* bias) {
      const int64_t columns = std::min(kPanel, own.width - column);
      for (int64_t r = 0; r < rows && columns > 0; ++r) {
        float* const to = of.to + r * of.ld + own.column + column;
        for (int64_t c = 0; c < columns; ++c) to[c] = strip[r * kPanel + c] + (bias == nullptr ? 0.0f : bias[c]);
      }
    };
    whole.store_strip = last || is_code || (tap.column >= 0 && !tap.before) || value.column >= 0;
    whole.activation = n_.activation;
    whole.slope = n_.slope;
    whole.ld_operand = stride_;
    const auto at = [](const float* vector, int64_t column) { return vector == nullptr ? nullptr : vector + column; };
    const auto panel_step = [&](int64_t index, float* strip, float* error) {
      const int64_t column = index * kPanel, columns = std::min(kPanel, width - column);
      ScoreStep p = whole;
      p.strip = strip;
      if (loads) {
        k.load_strip({x + column, Kind::f32}, rows, columns, width, strip);
      } else {
        const uint32_t* panel = n_.weights + n_.field(s, kWeight) + index * panel_words(in, n_.kind);
        score_product(n_.kind, rows, reduced, operand, stride_, panel, strip);
      }
      p.bias = at(n_.vector(s, kBias), column);
      p.scale = at(n_.vector(s, kScale), column);
      p.shift = at(n_.vector(s, kShift), column);
      p.stream = scratch_.get<float>(stream_) + column;
      p.operand = {last ? nullptr : next + column * size_of(n_.kind), n_.kind};
      if (tap.column >= 0 && tap.before) keep(strip, *taps, tap, column, p.bias);
      k.score_step(p);
      if (tap.column >= 0 && !tap.before) keep(strip, *taps, tap, column, nullptr);
      if (value.column >= 0) keep(strip, *values, value, column, nullptr);
      if (is_code) {
        for (int64_t r = 0; r < rows; ++r) std::memcpy(code + r * stride_ + column, strip + r * kPanel, columns * 4);
      }
      if (last) {
        const auto place = [&](float* m) { return m == nullptr ? nullptr : m + column; };
        k.score_error({rows, columns, width, strip, x + column, n_.likelihood, error, place(out.feature_error),
                       place(out.reconstruction)});
      }
    };
    for_panels(s, rows, last ? out.error : nullptr, panel_step);
    if (is_code) read_code(code, rows, out);
  }

  // Calls f(panel, strip, error) for a step's panels. Where threads share them, the errors of each are added up afterwards, in the order in which
  // one thread adds them.
  template <class F>
  void for_panels(int64_t s, int64_t rows, float* error, F panel_step) {
    const int64_t panels = at::divup(n_.field(s, kOut), kPanel);
    const int64_t threads = n_.field(s, kWeight) < 0 ? 1 : std::min({threads_, panels, n_.weight_bytes(s) / kBytesOfThread});
    if (threads <= 1) {
      for (int64_t i = 0; i < panels; ++i) panel_step(i, scratch_.get<float>(strip_), error);
      return;
    }
    float* const errors = scratch_.get<float>(errors_);
    if (error != nullptr) std::memset(errors, 0, static_cast<size_t>(panels * rows) * 4);
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        float* const strip = scratch_.get<float>(strip_ + thread * strip_bytes_);
        for (int64_t i = panels * thread / threads; i < panels * (thread + 1) / threads; ++i) panel_step(i, strip, errors + i * rows);
      }
      release_products(n_.kind);
    });
    for (int64_t i = 0; error != nullptr && i < panels; ++i) {
      for (int64_t r = 0; r < rows; ++r) error[r] += errors[i * rows + r];
    }
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
  const int64_t threads_;
  int64_t stride_, strip_bytes_, operands_[2], stream_, strip_, errors_, code_;
};

}  // namespace rvae::cpu::stack
