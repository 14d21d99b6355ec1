// What the forward and the backward pass of a stack share: its shape, how rows are divided among threads and tiles, and
// scratch memory. Passes run layer by layer; within a layer every thread walks the tiles of its own rows. A residual stack
// (pre, post) has one width; a plain one, Linear -> BatchNorm -> activation with nothing behind its last layer, has a width
// before and behind each layer.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/stack_gemm.h"
#include "cpu/stack_kernels.h"
#include "cpu/stack_memory.h"

namespace rvae::cpu::stack {

// Rows of a tile: what a tile needs stays in a core's second-level cache, and a product is long enough to pay for reading
// the weights. CPUs with AMX are done with a product so much sooner, and have so much of that cache (2 MiB), that higher tiles pay there:
// up to `most` rows, as far as they take no more than `bytes`.
constexpr int64_t kTileRows = 96;
int64_t tile_rows(int64_t bytes_of_row, int64_t bytes, int64_t most);

enum class Order : int { pre = 0, post = 1, plain = 2 };

struct Shape {
  int64_t rows, width, layers, layers_per_unit;  // `width` is that of the widest rows: strides follow it
  std::vector<int64_t> widths;                   // of the rows before each layer, and behind the last
  Order order;
  Activation activation;
  float slope;
  Kind stream;   // the input's and output's dtype
  Kind compute;  // of the operands of the products, and of what is kept inside a unit

  int64_t in(int64_t layer) const { return widths[layer]; }
  int64_t out(int64_t layer) const { return widths[layer + 1]; }
  bool plain() const { return order == Order::plain; }
  Kind output() const { return plain() ? compute : stream; }  // a plain stack ends like the linear layer that ends it
  // BatchNorms, and the width of what each of them normalises.
  int64_t norms() const { return plain() ? layers - 1 : layers; }
  int64_t normed(int64_t norm) const { return order == Order::pre ? in(norm) : out(norm); }

  int64_t padded() const { return round_up(width, kPanel); }
  static int64_t panels(int64_t columns) { return at::divup(columns, kPanel); }
  int64_t units() const { return layers / layers_per_unit; }
  int64_t unit(int64_t layer) const { return layer / layers_per_unit; }
  bool first_of_unit(int64_t layer) const { return layer % layers_per_unit == 0; }
  bool last_of_unit(int64_t layer) const { return (layer + 1) % layers_per_unit == 0; }

  // Row stride of an operand tile, in values: off the powers of two, whose rows would fall on the same cache sets.
  int64_t operand_stride() const { return padded() + 64 / size_of(compute); }

  // Index of a layer's raw output among the tensors kept inside units. Pre-activation: the last layer of a unit writes
  // the stream instead.
  int64_t inner_index(int64_t layer) const {
    return order == Order::pre ? unit(layer) * (layers_per_unit - 1) + layer % layers_per_unit : layer;
  }
  // The same as a first value, and of all of them the number.
  int64_t inner_begin(int64_t layer) const { return rows * (plain() ? vectors_before(layer) : inner_index(layer) * width); }
  int64_t inner_size() const {
    return rows * (plain() ? vectors_before(layers - 1) : (order == Order::pre ? layers - units() : layers) * width);
  }

  // First value of a layer's weight, and of a vector as wide as its output, where those of all layers lie one after another.
  int64_t weights_before(int64_t layer) const {
    if (!plain()) return layer * width * width;
    int64_t sum = 0;
    for (int64_t l = 0; l < layer; ++l) sum += in(l) * out(l);
    return sum;
  }
  int64_t vectors_before(int64_t layer) const {
    if (!plain()) return layer * width;
    int64_t sum = 0;
    for (int64_t l = 0; l < layer; ++l) sum += out(l);
    return sum;
  }
  // A layer's backward pass has five operands of a tile.
  int64_t tile_rows() const {
    return compute == Kind::f32 ? kTileRows : stack::tile_rows(5 * 2 * operand_stride(), int64_t{1} << 20, 192);
  }
  // Multiplications that a row takes in a layer, in the mean.
  int64_t row_work() const { return weights_before(layers) / layers; }
};

// Multiplications that are worth a thread of their own between two barriers: some 5 to 10 us of them. A barrier takes 5 to 10 us where
// its threads have a core each, several times that where they share one, and where other processes hold the cores it takes
// what the scheduler likes; so small layers stay with one thread.
constexpr int64_t kWorkOfThread = 400'000;

// Rows [begin(t), begin(t + 1)) are tile t; chunk c, one a thread, owns tiles [first_tile(c), first_tile(c + 1)). The
// division depends on the shapes and the number of threads alone, and so do the results.
struct Partition {
  int64_t rows, chunks, tiles;

  // `row_work`: multiplications that a row takes between two barriers.
  Partition(int64_t rows_, int64_t tile_rows, int64_t row_work) : rows(rows_) {
    const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    chunks = std::max<int64_t>(1, std::min({threads, rows / 8, rows * row_work / kWorkOfThread}));
    tiles = chunks * at::divup(at::divup(rows, chunks), tile_rows);
  }
  // Tiles of 64 rows and more begin at whole blocks, so that all but the last are whole blocks (product_rows).
  int64_t begin(int64_t tile) const {
    const int64_t row = rows * tile / tiles;
    return rows < 2 * kRowBlock * tiles ? row : std::min(rows, round_up(row, kRowBlock));
  }
  int64_t count(int64_t tile) const { return begin(tile + 1) - begin(tile); }
  int64_t first_tile(int64_t chunk) const { return tiles / chunks * chunk; }
  int64_t most_rows() const {
    const int64_t most = at::divup(rows, tiles);
    return rows < 2 * kRowBlock * tiles ? most : round_up(most, kRowBlock);
  }

  template <class F>
  void for_chunks(F f) const {
    at::parallel_for(0, chunks, 1, [&](int64_t begin_chunk, int64_t end_chunk) {
      for (int64_t chunk = begin_chunk; chunk < end_chunk; ++chunk) f(chunk);
    });
  }
};

constexpr int64_t kAlignment = 64;

// One allocation cut into pieces: measure with `add`, then `allocate`, then `get`.
class Scratch {
 public:
  // Reserves `bytes` and returns the piece's offset.
  int64_t add(int64_t bytes) {
    const int64_t offset = size_;
    size_ += round_up(bytes, kAlignment);
    return offset;
  }
  void allocate();
  template <class T>
  T* get(int64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

 private:
  int64_t size_ = 0;
  char* base_ = nullptr;
  at::Tensor memory_;
};

inline Rows rows_of(const at::Tensor& t, Kind kind, int64_t first_value) {
  return {static_cast<const char*>(t.data_ptr()) + first_value * size_of(kind), kind};
}
inline RowsOut rows_out(const at::Tensor& t, Kind kind, int64_t first_value) {
  return {static_cast<char*>(t.data_ptr()) + first_value * size_of(kind), kind};
}
inline Rows at_offset(Rows m, int64_t values) {
  return {m.data == nullptr ? nullptr : static_cast<const char*>(m.data) + values * size_of(m.kind), m.kind};
}
inline RowsOut at_offset(RowsOut m, int64_t values) {
  return {m.data == nullptr ? nullptr : static_cast<char*>(m.data) + values * size_of(m.kind), m.kind};
}

// Statistics of each layer's BatchNorm, [layers, 3, padded width]: mean, rstd, unbiased variance.
enum StatisticsRow : int64_t { kMean = 0, kRstd = 1, kVariance = 2 };

// The vectors a norm is applied with; scale = gamma * rstd and beta live here, mean and rstd in the statistics.
class NormVectors {
 public:
  explicit NormVectors(int64_t padded_width) : scale_(padded_width), beta_(padded_width) {}
  // gamma and beta may be nullptr.
  Norm set(const float* statistics, int64_t width, int64_t padded_width, const float* gamma, const float* beta);

 private:
  std::vector<float> scale_, beta_;
};

inline const float* data_or_null(const std::vector<at::Tensor>& tensors, int64_t i) {
  return tensors.empty() ? nullptr : tensors[i].const_data_ptr<float>();
}

// Packed weights, layer after layer, panel after panel.
class PackedWeights {
 public:
  PackedWeights(const std::vector<at::Tensor>& weights, const Shape& shape, bool forward);
  const uint32_t* panel(int64_t layer, int64_t panel) const {
    return words_ + layers_[layer].begin + panel * layers_[layer].panel_words;
  }

 private:
  struct Layer {
    int64_t begin, panel_words;
  };
  std::vector<Layer> layers_;
  at::Tensor memory_;
  const uint32_t* words_;
};

struct ForwardResult {
  at::Tensor out, inner, stream, statistics;
};

// The checked inputs of a forward pass; tensors are contiguous, lists are empty where the stack has no such parameter.
struct Inputs {
  at::Tensor x;
  std::vector<at::Tensor> weights, biases, gammas, betas, running_means, running_vars;
  double eps;
  bool batch_statistics;
};

ForwardResult forward(const Shape& shape, const Inputs& inputs, bool keep);

struct Needs {
  bool x;
  std::vector<bool> weights, biases, norms;  // one a layer (none of the last layer's norm in a plain stack)
};

// Of all layers one after another: Shape::weights_before, vectors_before.
struct Gradients {
  at::Tensor x, weights, biases, gammas, betas;
};

// `into`: where the gradients of the parameters are to be written, all of which must be needed; else they get memory of their own.
Gradients backward(const Shape& shape, const Inputs& inputs, const ForwardResult& kept, const at::Tensor& gradient,
                   const Needs& needs, const Gradients* into = nullptr);

}  // namespace rvae::cpu::stack
