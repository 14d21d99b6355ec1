#include "cpu/stack_weight_gradient.h"

#include <cstring>

namespace rvae::cpu::stack {

namespace {

// Rows of the gradient that a thread computes at a time by columns: their operand stays in the second-level cache while the
// panels of the other one pass.
constexpr int64_t kBlockRows = 192;

}  // namespace

WeightGradient::WeightGradient(const Shape& shape, const Partition& partition, int64_t tile_rows, Scratch& scratch,
                               const at::Tensor& gradient)
    : s_(shape), part_(partition), tile_rows_(tile_rows), tile_words_(words(tile_rows, shape.compute)),
      by_columns_(partition.tiles * tile_rows <= 2 * shape.width), scratch_(scratch), gradient_(gradient), k_(kernels()) {
  // By columns both operands hold all tiles, twice; by rows one tile a thread, and the left one is rewritten by each.
  const bool wanted = gradient_.numel() > 0;
  const int64_t tiles = by_columns_ ? part_.tiles : 1, copies = !wanted ? 0 : by_columns_ ? 2 : part_.chunks;
  right_rows_ = tiles * tile_rows_;
  left_words_ = tiles * tile_words_;
  operand_bytes_ = round_up(tile_words_ * right_stride() * 4, kAlignment);
  left_bytes_ = round_up(s_.padded() * left_words_ * 4, kAlignment);
  result_bytes_ = round_up((by_columns_ ? 1 : Shape::panels(s_.width)) * s_.padded() * kPanel * 4, kAlignment);
  operands_ = scratch_.add((!wanted ? 0 : by_columns_ ? 2 * part_.tiles : part_.chunks) * operand_bytes_);
  lefts_ = scratch_.add(copies * left_bytes_);
  results_ = scratch_.add(wanted ? (by_columns_ ? 1 : 2) * part_.chunks * result_bytes_ : 0);
}

RowsOut WeightGradient::operand(int64_t layer, int64_t chunk, int64_t tile) const {
  return {copy(operands_, operand_bytes_, by_columns_ ? (layer % 2) * part_.tiles + tile : chunk), s_.compute};
}

void WeightGradient::make_operand(int64_t layer, int64_t chunk, int64_t tile, Prologue p) const {
  const RowsOut a = operand(layer, chunk, tile);
  p.ld_operand = right_stride();
  if (s_.compute == Kind::bf16) {
    p.pairs = static_cast<uint32_t*>(a.data);
  } else {
    p.operand = a;
  }
  k_.prologue(p);
  // Rows that pad a tile take part in the product: zero. (Its columns of padding are the kernels' to clear.)
  const int64_t row_bytes = p.ld_operand * 4, filled = words(p.rows, s_.compute);
  std::memset(static_cast<char*>(a.data) + filled * row_bytes, 0, static_cast<size_t>((tile_words_ - filled) * row_bytes));
}

float* WeightGradient::accumulator(int64_t layer, int64_t chunk) const {
  return reinterpret_cast<float*>(copy(results_, result_bytes_, (layer % 2) * part_.chunks + chunk));
}

// The product wants dy^T row by row, and in bf16 pairs of rows in both operands.
void WeightGradient::add(int64_t layer, int64_t chunk, int64_t tile, const char* dy) const {
  const int64_t rows = product_terms(round_up(part_.count(tile), 4), s_.compute), stride = s_.operand_stride();
  const int64_t out = round_up(s_.out(layer), kPanel);
  char* const left = copy(lefts_, left_bytes_, by_columns_ ? layer % 2 : chunk);
  auto* const turned = reinterpret_cast<uint32_t*>(left) + (by_columns_ ? tile * tile_words_ : 0);
  const int64_t blocks = by_columns_ ? tile_words_ : round_up(words(rows, s_.compute), 16);
  const int64_t ld_turned = by_columns_ ? left_words_ : blocks;
  const bool pairs = s_.compute == Kind::bf16;
  if (pairs) {
    k_.transpose_pairs(reinterpret_cast<const uint16_t*>(dy), blocks, out, stride, turned, ld_turned);
  } else {
    k_.transpose_words(reinterpret_cast<const uint32_t*>(dy), blocks, out, stride, turned, ld_turned);
  }
  if (by_columns_) return;
  const bool first = tile == part_.first_tile(chunk);
  const int64_t height = product_rows(s_.out(layer), s_.compute);
  const int64_t ld_left = ld_turned * (pairs ? 2 : 1);
  const char* const right = static_cast<const char*>(operand(layer, chunk, tile).data);
  for (int64_t panel = 0; panel < Shape::panels(s_.in(layer)); ++panel) {
    multiply(s_.compute, height, rows, turned, ld_left, right + panel * kPanel * 4, right_stride(),
             accumulator(layer, chunk) + panel * height * kPanel, kPanel, /*add=*/!first);
  }
}

void WeightGradient::finish(int64_t layer, int64_t chunk) const {
  by_columns_ ? multiply_columns(layer, chunk) : add_threads(layer, chunk);
}

void WeightGradient::multiply_columns(int64_t layer, int64_t chunk) const {
  const bool pairs = s_.compute == Kind::bf16;
  const auto* left = reinterpret_cast<const uint32_t*>(copy(lefts_, left_bytes_, layer % 2));
  const char* const right = copy(operands_, operand_bytes_, (layer % 2) * part_.tiles);
  auto* const part = reinterpret_cast<float*>(copy(results_, result_bytes_, chunk));
  const int64_t height = s_.out(layer), width = s_.in(layer), panels = Shape::panels(width);
  const int64_t end = panels * (chunk + 1) / part_.chunks;
  for (int64_t row = 0; row < height; row += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, height - row);
    for (int64_t panel = panels * chunk / part_.chunks; panel < end; ++panel) {
      const int64_t columns = std::min(kPanel, width - panel * kPanel);
      float* const out = gradient(layer) + row * width + panel * kPanel;
      const bool whole = columns == kPanel;
      multiply(s_.compute, rows, right_rows_, left + row * left_words_, left_words_ * (pairs ? 2 : 1),
               right + panel * kPanel * 4, right_stride(), whole ? out : part, whole ? width : kPanel, /*add=*/false);
      if (whole) continue;
      for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(out + r * width, part + r * kPanel, static_cast<size_t>(columns) * sizeof(float));
      }
    }
  }
}

// This thread's rows of the gradient, summed over the threads that hold parts of it.
void WeightGradient::add_threads(int64_t layer, int64_t chunk) const {
  std::vector<const float*> parts(part_.chunks);
  const int64_t height = s_.out(layer), width = s_.in(layer), stride = product_rows(height, s_.compute);
  float* const sum = gradient(layer);
  for (int64_t row = height * chunk / part_.chunks; row < height * (chunk + 1) / part_.chunks; ++row) {
    for (int64_t panel = 0; panel < Shape::panels(width); ++panel) {
      for (int64_t c = 0; c < part_.chunks; ++c) parts[c] = accumulator(layer, c) + (panel * stride + row) * kPanel;
      k_.sum_buffers(parts.data(), part_.chunks, std::min(kPanel, width - panel * kPanel), sum + row * width + panel * kPanel);
    }
  }
}

}  // namespace rvae::cpu::stack
