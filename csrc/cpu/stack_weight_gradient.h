// The weight gradients of a stack, dy^T a for each layer, gathered while the backward pass walks the tiles.
//
// Two plans. By rows: every thread sums its own tiles into a [width, width] buffer, and the threads' buffers are added up
// afterwards. By columns: the operands of all rows are kept, and each thread then computes its share of the gradient's
// columns over all of them at once. The second reads and writes each gradient once, but must keep both operands: it is
// the better one as long as the rows are few beside the width.
//
// Either way the second half of a layer's work runs while the next layer's tiles are walked, so that it needs no barrier of
// its own; buffers that both halves touch exist twice, for even and for odd layers.
#pragma once

#include "cpu/stack_pass.h"

namespace rvae::cpu::stack {

class WeightGradient {
 public:
  // Reserves what it needs in `scratch`. `tile_rows` is the height of the operand tiles, whole blocks of 16 words;
  // `gradient` is that of all layers one after another, or empty where nothing is wanted.
  WeightGradient(const Shape& shape, const Partition& partition, int64_t tile_rows, Scratch& scratch,
                 const at::Tensor& gradient);

  // Computes the operand `a` of a tile, to where `add` finds it: fp32 in rows, bf16 in pairs of rows.
  void make_operand(int64_t layer, int64_t chunk, int64_t tile, Prologue p) const;

  // First half, in chunk's own thread: takes a tile's dy beside the `a` that was made before. Rows of dy behind the
  // tile's own must be zero.
  void add(int64_t layer, int64_t chunk, int64_t tile, const char* dy) const;

  // Second half, once every chunk has added its tiles: this chunk's share of the gradient of `layer`.
  void finish(int64_t layer, int64_t chunk) const;

 private:
  void add_threads(int64_t layer, int64_t chunk) const;
  void multiply_columns(int64_t layer, int64_t chunk) const;

  int64_t right_stride() const { return s_.padded() + 16; }  // words; off the powers of two
  RowsOut operand(int64_t layer, int64_t chunk, int64_t tile) const;
  char* copy(int64_t offset, int64_t bytes, int64_t index) const { return scratch_.get<char>(offset + bytes * index); }
  float* accumulator(int64_t layer, int64_t chunk) const;
  float* gradient(int64_t layer) const { return gradient_.data_ptr<float>() + s_.weights_before(layer); }

  const Shape s_;
  const Partition& part_;
  const int64_t tile_rows_, tile_words_;
  const bool by_columns_;
  Scratch& scratch_;
  const at::Tensor gradient_;
  const Kernels& k_;
  int64_t right_rows_, left_words_;  // rows of the right operand, words in a row of the left one
  int64_t operand_bytes_, left_bytes_, result_bytes_;
  int64_t operands_, lefts_, results_;
};

}  // namespace rvae::cpu::stack
