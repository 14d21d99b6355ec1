// A frozen network, from rows to scores in one call: a thread takes a tile of rows through every layer, and the tile's
// operands, residual stream and strips stay in its core's cache; nothing of the size of the batch is written unless it is
// asked for. BatchNorms are folded and weights packed beforehand (rvae_fast/scorer.py builds the program).
//
// The op has no state, so any number of threads may score at once with one program. What is computed for a row does not
// depend on the rows beside it: the elementwise steps are per row, and products add up a row's terms in one order however
// many rows there are (brgemm does; where torch has none, our own kernel does).
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <string_view>
#include <vector>

#include "cpu/score_tile.h"

namespace rvae::cpu::stack {

namespace {

std::vector<at::Tensor> score(const at::Tensor& x, const at::Tensor& program, const at::Tensor& weights, const at::Tensor& vectors,
                              int64_t latent, bool variational, double low, double high, std::string_view likelihood,
                              int64_t activation, double slope, bool bf16, bool want_kld, bool want_latent,
                              bool want_reconstruction, bool want_feature_error) {
  const Network n = make_network(program, weights, vectors, latent, variational, low, high, likelihood, activation, slope, bf16);
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) == n.in_features, "score: x must have shape [batch, ", n.in_features, "], got ",
                    x.sizes());

  const at::Tensor rows = fp32_rows(x);
  const int64_t count = rows.size(0);
  const auto make = [&](bool wanted, int64_t columns) { return at::empty({wanted ? count : 0, columns}, rows.options()); };
  const at::Tensor error = at::empty({count}, rows.options()), kld = at::empty({want_kld ? count : 0}, rows.options());
  const at::Tensor code = make(want_latent, latent), reconstruction = make(want_reconstruction, n.in_features),
                   feature_error = make(want_feature_error, n.in_features);
  if (count > 0) {
    const bool shared = shares_columns(n, count);
    const Partition part(count, n.tile_rows(), shared ? 0 : n.row_work());
    const auto at_row = [](const at::Tensor& t, bool wanted, int64_t row, int64_t columns) {
      return wanted ? t.data_ptr<float>() + row * columns : nullptr;
    };
    for_chunks(part, [&](int64_t chunk) {
      Tile tile(n, part.most_rows(), shared ? at::get_num_threads() : 1);
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
  const bool shared = shares_columns(n, rows);
  const Partition part(rows, n.tile_rows(), shared ? 0 : n.row_work());
  for_chunks(part, [&](int64_t chunk) {
    Tile tile(n, part.most_rows(), shared ? at::get_num_threads() : 1);
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
