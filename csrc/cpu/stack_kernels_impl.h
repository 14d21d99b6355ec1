// The functions of stack_kernels.h, written once on vectors and compiled for each instruction set by a file that defines
// RVAE_LANES (and the name of its table) and includes this one. See simd_vector.h for why everything is anonymous.
#pragma once

#include <type_traits>

#include "cpu/simd_activation.h"
#include "cpu/simd_backward.h"
#include "cpu/simd_layout.h"
#include "cpu/simd_rows.h"
#include "cpu/simd_score.h"
#include "cpu/simd_vector.h"
#include "cpu/stack_kernels.h"

namespace {

using rvae::cpu::stack::Epilogue;
using rvae::cpu::stack::Kernels;
using rvae::cpu::stack::Norm;
using rvae::cpu::stack::Prologue;

// --------------------------------------------------------------------------------------------------------- before a product

template <class Operand>
RVAE_INLINE auto* place(const Prologue& p, int64_t r) {
  if constexpr (std::is_same_v<Operand, Pairs>) {
    return p.pairs + r / 2 * p.ld_operand;
  } else {
    return row_if<Operand>(p.operand, r, p.ld_operand);
  }
}

template <Activation A, bool Normed, class Source, class Residual, class Stream, class Operand>
void prologue_rows(const Prologue& p) {
  const vf slope = splat(p.slope);
  const Norm norm = p.norm;
  const int64_t width = p.width, ld_operand = p.ld_operand;
  for_groups(p.rows, [&](int64_t r, auto group) {
    constexpr int rows = decltype(group)::value;
    const Source* const source = row<Source>(p.source, r, width);
    const auto* const residual = row_if<Residual>(p.residual, r, width);
    auto* const stream = row_if<Stream>(p.stream, r, width);
    constexpr bool pairs = std::is_same_v<Operand, Pairs>;
    auto* const operand = place<Operand>(p, r);
    for_columns(width, [&](int64_t c, auto lanes) {
      vf mean{}, scale{}, beta{};
      if constexpr (Normed) {
        mean = load(norm.mean + c, Full{});
        scale = load(norm.scale + c, Full{});
        beta = load(norm.beta + c, Full{});
      }
      vf before{};
#pragma GCC unroll 4
      for (int i = 0; i < rows; ++i) {
        vf h = load(source + i * width + c, lanes);
        if constexpr (Normed) h = (h - mean) * scale + beta;
        if constexpr (present<Residual>) h += load(residual + i * width + c, lanes);
        h = activate<A>(h, slope);
        if constexpr (present<Stream>) store(stream + i * width + c, h, lanes);
        if constexpr (pairs) {
          h = inside(h, lanes);
          if (i % 2 != 0) store_pairs(operand + i / 2 * ld_operand + c, before, h);
          if (i % 2 == 0 && i + 1 == rows) store_pairs(operand + i / 2 * ld_operand + c, h, vf{});
          before = h;
        } else if constexpr (present<Operand>) {
          store(operand + i * ld_operand + c, inside(h, lanes), Full{});
        }
      }
    });
    clear_panels(operand, pairs ? (rows + 1) / 2 : rows, ld_operand, width);
  });
}

template <Activation A, class Source, class Residual, class Stream, class Operand>
RVAE_INLINE void prologue_rows(const Prologue& p) {
  p.norm.mean != nullptr ? prologue_rows<A, true, Source, Residual, Stream, Operand>(p)
                         : prologue_rows<A, false, Source, Residual, Stream, Operand>(p);
}

void prologue(const Prologue& p) {
  with_activation(p.activate ? p.activation : Activation::identity, [&](auto activation) {
    constexpr Activation A = decltype(activation)::value;
    if (p.pairs != nullptr) {
      return with_elements(p.source.kind, Kind::bf16, [&](auto source, auto) {
        prologue_rows<A, typename decltype(source)::type, None, None, Pairs>(p);
      });
    }
    if (p.stream.data == nullptr) {
      return with_elements(p.source.kind, p.operand.kind, [&](auto source, auto operand) {
        prologue_rows<A, typename decltype(source)::type, None, None, typename decltype(operand)::type>(p);
      });
    }
    with_elements(p.stream.kind, p.source.kind, [&](auto stream, auto source) {
      using S = typename decltype(stream)::type;
      using T = typename decltype(source)::type;
      if (p.operand.data != nullptr) return prologue_rows<A, T, S, S, T>(p);
      prologue_rows<A, T, S, S, None>(p);
    });
  });
}

// ---------------------------------------------------------------------------------------------------------- after a product

// The column moments of a tile in one pass, about a value that is likely near its mean: that of the tile's first rows. Where it is not, which
// shows in (mean - pivot)^2 beside the variance, a second pass takes them about the mean.
template <class Residual, class Out, bool Moments>
void epilogue_rows(const Epilogue& p) {
  constexpr int64_t kPivotRows = 8;
  const int64_t width = p.width, rows = p.rows, columns = p.columns;
  const float* const strip = p.strip;
  const auto* const residual = row_if<Residual>(p.residual, 0, width);
  auto* const out = row_if<Out>(p.out, 0, width);
  vf bias[kVectors] = {};
  if (p.bias != nullptr) for_panel(columns, [&](int v, int c, auto lanes) { bias[v] = load(p.bias + c, lanes); });
  const auto value = [&](int64_t r, int v, int c, auto lanes) {
    vf y = load(strip + r * kPanel + c, Full{}) + bias[v];
    if constexpr (present<Residual>) y += load(residual + r * width + c, lanes);
    return y;
  };
  vf pivot[kVectors] = {}, sum[kVectors] = {}, squares[kVectors] = {};
  if constexpr (Moments) {
    const int64_t few = rows < kPivotRows ? rows : kPivotRows;
    for (int64_t r = 0; r < few; ++r) for_panel(columns, [&](int v, int c, auto lanes) { pivot[v] += value(r, v, c, lanes); });
    for (int v = 0; v < kVectors; ++v) pivot[v] *= 1.0f / static_cast<float>(few);
  }
  for_strip(rows, columns, [&](int64_t r, int v, int c, auto lanes) {
    vf y = value(r, v, c, lanes);
    if constexpr (present<Out>) {
      store(out + r * width + c, y, lanes);
      if constexpr (Moments) y = as_stored<Out>(y);  // the next layer normalises what it reads
    }
    if constexpr (Moments) {
      const vf d = y - pivot[v];
      sum[v] += d;
      squares[v] += d * d;
    }
  });
  if constexpr (Moments) {
    const float share = 1.0f / static_cast<float>(rows);
    constexpr float kFar = 2.0f;
    bool far = false;
    for (int v = 0; v < kVectors; ++v) far |= any(sum[v] * sum[v] * share > (squares[v] - sum[v] * sum[v] * share) * kFar);
    if (far) {
      for (int v = 0; v < kVectors; ++v) pivot[v] += sum[v] * share, sum[v] = squares[v] = vf{};
      for_strip(rows, columns, [&](int64_t r, int v, int c, auto lanes) {
        vf y;
        if constexpr (present<Out>) {
          y = load(out + r * width + c, lanes);  // the residual may be overwritten by now
        } else {
          y = value(r, v, c, lanes);
        }
        const vf d = y - pivot[v];
        sum[v] += d;
        squares[v] += d * d;
      });
    }
    for (int v = 0; v < kVectors; ++v) {
      const vf shift = sum[v] * share;
      const vf m2 = squares[v] - sum[v] * shift;
      store(p.mean + v * kLanes, pivot[v], Full{});
      store(p.shift + v * kLanes, shift, Full{});
      // In a constant column of large numbers nothing but rounding is left, of either sign. (NaN stays NaN.)
      store(p.m2 + v * kLanes, m2 < 0.0f ? vf{} : m2, Full{});
    }
  }
}

template <class Residual, class Out>
RVAE_INLINE void epilogue_rows(const Epilogue& p) {
  p.mean != nullptr ? epilogue_rows<Residual, Out, true>(p) : epilogue_rows<Residual, Out, false>(p);
}

void epilogue(const Epilogue& p) {
  if (p.out.data == nullptr) return epilogue_rows<None, None>(p);
  with_elements(p.out.kind, p.out.kind, [&](auto out, auto) {
    using T = typename decltype(out)::type;
    if (p.residual.data == nullptr) return epilogue_rows<None, T>(p);
    epilogue_rows<T, T>(p);
  });
}

void load_strip(Rows source, int64_t rows, int64_t columns, int64_t width, float* strip) {
  with_elements(source.kind, source.kind, [&](auto element, auto) {
    using T = typename decltype(element)::type;
    for (int64_t r = 0; r < rows; ++r) {
      if (columns != kPanel) {
        for (int v = 0; v < kVectors; ++v) store(strip + r * kPanel + v * kLanes, vf{}, Full{});
      }
      for_panel(columns, [&](int, int c, auto lanes) {
        store(strip + r * kPanel + c, load(row<T>(source, r, width) + c, lanes), Full{});
      });
    }
  });
}

constexpr Kernels make_kernels(const char* isa) {
  return {isa,           prologue,     epilogue,        backward_prologue, backward_epilogue, load_strip,
          load_operand,  transpose_words, transpose_pairs, spread_rows,     sum_buffers,       merge_moments,
          sum_tiles,     score_step,      score_error,     score_product};
}

}  // namespace
