#include "cpu/stack_pass.h"

namespace rvae::cpu::stack {

void Scratch::allocate() {
  memory_ = empty_large({size_ + kAlignment}, at::TensorOptions().dtype(at::kByte));
  const auto address = reinterpret_cast<uintptr_t>(memory_.data_ptr());
  base_ = reinterpret_cast<char*>((address + kAlignment - 1) / kAlignment * kAlignment);
}

int64_t tile_rows(int64_t bytes_of_row, int64_t bytes, int64_t most) {
  if (!uses_amx()) return kTileRows;
  return std::clamp(bytes / bytes_of_row / kRowBlock * kRowBlock, kTileRows, most);
}

Norm NormVectors::set(const float* statistics, int64_t width, int64_t padded_width, const float* gamma, const float* beta) {
  const float* rstd = statistics + kRstd * padded_width;
  for (int64_t c = 0; c < width; ++c) {
    scale_[c] = gamma == nullptr ? rstd[c] : gamma[c] * rstd[c];
    beta_[c] = beta == nullptr ? 0.0f : beta[c];
  }
  return {statistics + kMean * padded_width, rstd, scale_.data(), beta_.data()};
}

PackedWeights::PackedWeights(const std::vector<at::Tensor>& weights, const Shape& shape, bool forward) {
  struct Piece {  // a panel, or for the backward rows that go to all panels
    int64_t layer, index;
  };
  std::vector<Piece> pieces;
  int64_t total = 0;
  for (int64_t layer = 0; layer < shape.layers; ++layer) {
    const int64_t reduced = forward ? shape.in(layer) : shape.out(layer);
    const int64_t panels = Shape::panels(forward ? shape.out(layer) : shape.in(layer));
    layers_.push_back({total, panel_words(reduced, shape.compute)});
    total += panels * layers_.back().panel_words;
    const int64_t count = forward ? panels : at::divup(shape.out(layer), kPackRows);
    for (int64_t i = 0; i < count; ++i) pieces.push_back({layer, i});
  }
  memory_ = empty_large({total + kAlignment / 4}, at::TensorOptions().dtype(at::kInt));
  const auto address = reinterpret_cast<uintptr_t>(memory_.data_ptr());
  auto* const packed = reinterpret_cast<uint32_t*>((address + kAlignment - 1) / kAlignment * kAlignment);
  words_ = packed;
  const int64_t most = panel_words(shape.width, shape.compute);
  // Packing takes about a nanosecond for eight words, waking a thread some microseconds.
  at::parallel_for(0, static_cast<int64_t>(pieces.size()), at::divup(32768, most), [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> scratch(forward ? most : 0);
    for (int64_t i = begin; i < end; ++i) {
      const auto [layer, index] = pieces[i];
      const float* const weight = weights[layer].const_data_ptr<float>();
      uint32_t* const own = packed + layers_[layer].begin;
      if (forward) {
        pack_forward(weight, shape.out(layer), shape.in(layer), index, shape.compute, own + index * layers_[layer].panel_words,
                     scratch.data());
      } else {
        pack_backward(weight, shape.out(layer), shape.in(layer), index * kPackRows, shape.compute, own);
      }
    }
  });
}

}  // namespace rvae::cpu::stack
