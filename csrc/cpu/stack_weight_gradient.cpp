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
  const bool pairs = s_.compute == Kind::bf16;
  operand_bytes_ = round_up(tile_rows_ * s_.operand_stride() * size_of(s_.compute), kAlignment);
  left_bytes_ = round_up(s_.padded() * left_words_ * 4, kAlignment);
  // dy's pairs need a buffer in each thread, before they are turned; a's lie beside each other by columns.
  pairs_bytes_ = pairs ? round_up(tile_words_ * s_.padded() * 4, kAlignment) : 0;
  result_bytes_ = round_up((by_columns_ ? 1 : Shape::panels(s_.width)) * s_.width * kPanel * 4, kAlignment);
  // In fp32 `a` is multiplied as it was written, so by columns it is written to its place among all tiles.
  const int64_t tiles_of_a = !wanted ? 0 : by_columns_ && !pairs ? 2 * part_.tiles : part_.chunks;
  operands_ = scratch_.add(tiles_of_a * operand_bytes_);
  lefts_ = scratch_.add(copies * left_bytes_);
  pairs_ = scratch_.add(wanted ? ((by_columns_ ? 2 * part_.tiles : 0) + part_.chunks) * pairs_bytes_ : 0);
  results_ = scratch_.add(wanted ? (by_columns_ ? 1 : 2) * part_.chunks * result_bytes_ : 0);
}

RowsOut WeightGradient::operand(int64_t layer, int64_t chunk, int64_t tile) const {
  const bool shared = by_columns_ && s_.compute == Kind::f32;
  return {copy(operands_, operand_bytes_, shared ? (layer % 2) * part_.tiles + tile : chunk), s_.compute};
}

float* WeightGradient::accumulator(int64_t layer, int64_t chunk) const {
  return reinterpret_cast<float*>(copy(results_, result_bytes_, (layer % 2) * part_.chunks + chunk));
}

// The product wants dy^T row by row, and in bf16 pairs of rows in both operands.
void WeightGradient::add(int64_t layer, int64_t chunk, int64_t tile, const char* dy) const {
  const int64_t rows = padded_rows(part_.count(tile)), stride = s_.operand_stride();
  const int64_t in = round_up(s_.in(layer), kPanel), out = round_up(s_.out(layer), kPanel);
  char* const left = copy(lefts_, left_bytes_, by_columns_ ? layer % 2 : chunk);
  auto* const turned = reinterpret_cast<uint32_t*>(left) + (by_columns_ ? tile * tile_words_ : 0);
  const int64_t blocks = by_columns_ ? tile_words_ : round_up(words(rows, s_.compute), 16);
  const int64_t ld_turned = by_columns_ ? left_words_ : blocks;
  const RowsOut a = operand(layer, chunk, tile);
  const char* right = static_cast<const char*>(a.data);
  int64_t ld_left = ld_turned, ld_right = stride;
  if (s_.compute == Kind::f32) {
    k_.transpose_words(reinterpret_cast<const uint32_t*>(dy), blocks, out, stride, turned, ld_turned);
  } else {
    const int64_t own = (by_columns_ ? 2 * part_.tiles : 0) + chunk;
    auto* const pairs = reinterpret_cast<uint32_t*>(copy(pairs_, pairs_bytes_, own));
    k_.interleave_rows(reinterpret_cast<const uint16_t*>(dy), blocks, out, stride, pairs, s_.padded());
    k_.transpose_words(pairs, blocks, out, s_.padded(), turned, ld_turned);
    const int64_t place = by_columns_ ? (layer % 2) * part_.tiles + tile : own;
    auto* const right_pairs = reinterpret_cast<uint32_t*>(copy(pairs_, pairs_bytes_, place));
    const int64_t right_words = by_columns_ ? tile_words_ : rows / 2;
    k_.interleave_rows(reinterpret_cast<const uint16_t*>(right), right_words, in, stride, right_pairs, s_.padded());
    right = reinterpret_cast<const char*>(right_pairs);
    ld_right = s_.padded();
    ld_left = 2 * ld_turned;
  }
  if (by_columns_) return;
  const bool first = tile == part_.first_tile(chunk);
  for (int64_t panel = 0; panel < Shape::panels(s_.in(layer)); ++panel) {
    multiply(s_.compute, s_.out(layer), rows, turned, ld_left, right + panel * kPanel * 4, ld_right,
             accumulator(layer, chunk) + panel * s_.out(layer) * kPanel, kPanel, /*add=*/!first);
  }
}

void WeightGradient::finish(int64_t layer, int64_t chunk) const {
  by_columns_ ? multiply_columns(layer, chunk) : add_threads(layer, chunk);
}

void WeightGradient::multiply_columns(int64_t layer, int64_t chunk) const {
  const bool pairs = s_.compute == Kind::bf16;
  const auto* left = reinterpret_cast<const uint32_t*>(copy(lefts_, left_bytes_, layer % 2));
  const char* right = pairs ? copy(pairs_, pairs_bytes_, (layer % 2) * part_.tiles)
                            : copy(operands_, operand_bytes_, (layer % 2) * part_.tiles);
  const int64_t ld_right = pairs ? s_.padded() : s_.operand_stride();
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
               right + panel * kPanel * 4, ld_right, whole ? out : part, whole ? width : kPanel, /*add=*/false);
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
  const int64_t height = s_.out(layer), width = s_.in(layer);
  float* const sum = gradient(layer);
  for (int64_t row = height * chunk / part_.chunks; row < height * (chunk + 1) / part_.chunks; ++row) {
    for (int64_t panel = 0; panel < Shape::panels(width); ++panel) {
      for (int64_t c = 0; c < part_.chunks; ++c) parts[c] = accumulator(layer, c) + (panel * height + row) * kPanel;
      k_.sum_buffers(parts.data(), part_.chunks, std::min(kPanel, width - panel * kPanel), sum + row * width + panel * kPanel);
    }
  }
}

}  // namespace rvae::cpu::stack
