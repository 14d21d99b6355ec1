#include "cpu/score_tile.h"

#include <ATen/ops/empty.h>

#include <algorithm>

namespace rvae::cpu::stack {

namespace {

// Whether the fp32 products that torch carries treat a row alone as they treat it among others. A plain GEMM, which is
// what they are where there are no micro-kernels, has other ways for a handful of rows.
bool rows_are_independent() {
  static const bool independent = [] {
    constexpr int64_t rows = 96, longest = kLongestChain + 91;  // in one block, and in two
    std::vector<float> a(rows * longest), b(longest * kPanel), all(rows * kPanel), few(rows * kPanel);
    uint32_t state = 1;
    const auto random = [&state] { return static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-23f - 1.0f; };
    for (float& value : a) value = random();
    for (float& value : b) value = random();
    for (const int64_t k : {int64_t{203}, longest}) {
      multiply(Kind::f32, rows, k, a.data(), k, b.data(), kPanel, all.data(), kPanel, false);
      for (const int64_t n : {1, 2, 3, 4, 8, 12, 40}) {
        multiply(Kind::f32, n, k, a.data(), k, b.data(), kPanel, few.data(), kPanel, false);
        if (std::memcmp(few.data(), all.data(), n * kPanel * sizeof(float)) != 0) return false;
      }
    }
    return true;
  }();
  return independent;
}

std::atomic<bool> forked{false};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool is_forked() {
  return forked;
}

at::Tensor fp32_rows(const at::Tensor& x) {
  if (!is_forked()) return x.to(at::kFloat).contiguous();
  if (x.scalar_type() == at::kFloat && x.is_contiguous()) return x;
  constexpr int64_t kPiece = 16384;  // values; PyTorch's copies start threads above 32768
  at::Tensor rows = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  const int64_t columns = std::min(x.size(1), kPiece), count = kPiece / std::max<int64_t>(1, columns);
  for (int64_t r = 0; r < x.size(0); r += count) {
    for (int64_t c = 0; c < x.size(1); c += columns) {
      const auto piece = [&](const at::Tensor& t) {
        return t.narrow(0, r, std::min(count, x.size(0) - r)).narrow(1, c, std::min(columns, x.size(1) - c));
      };
      piece(rows).copy_(piece(x));
    }
  }
  return rows;
}

void score_product(Kind kind, int64_t rows, int64_t reduced, const void* operand, int64_t ld, const uint32_t* panel, float* strip) {
  if (kind == Kind::f32 && !rows_are_independent()) {
    return for_blocks(reduced, [&](int64_t first, int64_t count) {
      kernels().score_product(rows, count, static_cast<const float*>(operand) + first, ld,
                              reinterpret_cast<const float*>(panel) + first * kPanel, strip, /*add=*/first > 0);
    });
  }
  multiply(kind, rows <= 4 ? rows : product_rows(rows, kind), reduced, operand, ld, panel, kPanel, strip, kPanel, /*add=*/false);
}

Network make_network(const at::Tensor& program, const at::Tensor& weights, const at::Tensor& vectors, int64_t latent,
                     bool variational, double low, double high, std::string_view likelihood, int64_t activation, double slope,
                     bool bf16) {
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
  TORCH_CHECK(!bf16 || has_bf16_products(), "score: this CPU has no bf16 products");
  return n;
}

}  // namespace rvae::cpu::stack
