// The elementwise halves of a residual stack's layer pass: what happens to a tile of rows before and after its matrix
// product. One table of functions per instruction set; this header is plain data, so that a file compiled for an
// instruction set can include it without sharing any inline function with a portable file.
//
//   W            width of the stack;  panel = 32 columns;  Wp = W rounded up to whole panels
//   tile         a few dozen rows, small enough to stay in cache between the steps
//   operand      a tile as the product wants it: [rows, ld], fp32 or bf16, columns W..ld zero where the product sees them
//   strip        product of a tile with one panel of weights: fp32 [rows, 32]
//   column data  (mean, rstd, ...) fp32, readable up to Wp
#pragma once

#include <cstdint>

namespace rvae::cpu::stack {

constexpr int64_t kPanel = 32;

enum class Kind : int { f32 = 0, bf16 = 1 };
enum class Activation : int { identity = 0, relu, leaky_relu, elu, silu, gelu, tanh };

// z = (r - mean) * scale + beta, with scale = gamma * rstd. `mean == nullptr` stands for no normalisation.
struct Norm {
  const float* mean = nullptr;
  const float* rstd = nullptr;
  const float* scale = nullptr;
  const float* beta = nullptr;
};

// A matrix of rows in memory the user or autograd owns: [rows, W], rows W apart.
struct Rows {
  const void* data = nullptr;
  Kind kind = Kind::f32;
};
struct RowsOut {
  void* data = nullptr;
  Kind kind = Kind::f32;
};

// Before a product: operand = act(norm(source)), or, at the start of a post-activation unit,
// stream = operand = act(norm(source) + residual), where `operand` may be absent.
struct Prologue {
  int64_t rows, width;
  Rows source;
  Norm norm;
  Rows residual;
  bool activate;
  Activation activation;
  float slope;
  RowsOut stream;
  RowsOut operand;
  int64_t ld_operand;
  uint32_t* pairs = nullptr;  // in place of `operand`: words[p, c] = the pair (row 2p, row 2p + 1) of bf16, `ld_operand` words apart
};

// After a product: out = strip + bias + residual, and the (mean, M2) of its columns over the tile. The mean is mean + shift:
// in one fp32 number, that of columns far from zero would be off by a part of their deviation, and the merged variance with it.
// `out.data == nullptr`: statistics alone.
struct Epilogue {
  int64_t rows, columns, width;
  const float* strip;
  const float* bias;  // `columns` values
  Rows residual;
  RowsOut out;
  float* mean;  // 32 values each, or nullptr
  float* shift;
  float* m2;
};

// Before a layer's backward products: the gradient of its raw output r,
//   dy = c1 * (dz - c2 - c3 * (r - mean)) + carried
// where dz is the gradient behind the BatchNorm that reads r (dz.data == nullptr: dy = carried).
struct BackwardPrologue {
  int64_t rows, width;
  Rows dz, r;
  const float *mean, *c1, *c2, *c3;
  Rows carried;
  RowsOut carried_out;  // dy as the gradient of the residual stream
  RowsOut operand;
  int64_t ld_operand;
  float* column_sum;  // += sum of dy over the rows (the gradient of the bias), or nullptr
};

// After the product of dy with the weights: dz = strip * act'(norm(r)), and the column sums of dz and dz * xhat.
// At the end of a post-activation unit `residual` is set: dz = (strip + carried) * act'(norm(r) + residual).
// `norm.mean == nullptr`: out = strip + carried.
struct BackwardEpilogue {
  int64_t rows, columns, width;
  const float* strip;
  Rows r;
  Norm norm;
  Rows residual, carried;
  Activation activation;
  float slope;
  RowsOut out;
  float* sum_dz;  // 32 values each
  float* sum_dz_xhat;
};

// A step of a frozen network, on a strip: y = strip + bias (+ stream), activated (activate_first), kept as the stream or
// in the strip where asked; operand = y * scale + shift, activated (activate_last). All buffers hold whole panels.
struct ScoreStep {
  int64_t rows;
  float* strip;
  const float *bias, *scale, *shift;  // 32 values each, or nullptr
  float* stream;
  int64_t ld_stream;
  bool add_stream, activate_first, store_stream, store_strip, activate_last;
  Activation activation;
  float slope;
  RowsOut operand;  // the next product's left-hand side, at this panel's first column
  int64_t ld_operand;
};

// error[row] += the reconstruction errors of this strip's columns, which take the strip's place; all other matrices are
// [rows, width].
struct ScoreError {
  int64_t rows, columns, width;
  float* strip;
  const float* x;
  int likelihood;  // 0 squared, 1 absolute, 2 Bernoulli on logits
  float* error;
  float* feature_error;   // or nullptr
  float* reconstruction;  // or nullptr
};

struct Kernels {
  const char* isa;
  void (*prologue)(const Prologue&);
  void (*epilogue)(const Epilogue&);
  void (*backward_prologue)(const BackwardPrologue&);
  void (*backward_epilogue)(const BackwardEpilogue&);
  // strip[rows, 32] = the first `columns` of each row; the rest is zero.
  void (*load_strip)(Rows source, int64_t rows, int64_t columns, int64_t width, float* strip);
  // Rows converted to an operand, zeros up to ld.
  void (*load_operand)(const float* source, int64_t rows, int64_t columns, int64_t ld_source, RowsOut operand, int64_t ld);
  // words[c, r] = source[r, c] for 32-bit words; rows and columns must be multiples of 16.
  void (*transpose_words)(const uint32_t* source, int64_t rows, int64_t columns, int64_t ld_source, uint32_t* words, int64_t ld);
  // words[c, p] = the pair (source[2p, c], source[2p + 1, c]) of bf16; pairs and columns must be multiples of 16.
  void (*transpose_pairs)(const uint16_t* source, int64_t pairs, int64_t columns, int64_t ld_source, uint32_t* words, int64_t ld);
  // A weight's rows spread over panels of 32 columns, `panel_words` words apart; see simd_layout.h.
  void (*spread_rows)(const float* source, int64_t rows, int64_t columns, int64_t ld_source, Kind kind, uint32_t* packed,
                      int64_t panel_words);
  // out = the sum over `count` buffers, `n` values each.
  void (*sum_buffers)(const float* const* buffers, int64_t count, int64_t n, float* out);
  // Chan's rule over `tiles` of (count, mean + shift, M2): means[t * stride + c], shifts[...], m2s[...]; results in double,
  // n_columns each.
  void (*merge_moments)(const int64_t* counts, const float* means, const float* shifts, const float* m2s, int64_t tiles,
                        int64_t stride, int64_t columns, double* mean, double* m2);
  // out[c] = sum over tiles of values[t * stride + c], in double.
  void (*sum_tiles)(const float* values, int64_t tiles, int64_t stride, int64_t columns, double* out);
  void (*score_step)(const ScoreStep&);
  void (*score_error)(const ScoreError&);
  // c[rows, 32] = or += a[rows, reduced] * b[reduced, 32], a row's terms added from first to last whatever the number of rows.
  void (*score_product)(int64_t rows, int64_t reduced, const float* a, int64_t ld, const float* b, float* c, bool add);
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512bf16_kernels();

// The best table that this machine and RVAE_FAST_CPU_ISA (cpu_features.h) allow.
const Kernels& kernels();

}  // namespace rvae::cpu::stack
