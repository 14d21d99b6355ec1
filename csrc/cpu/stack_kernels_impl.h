// The functions of stack_kernels.h, written once on vectors and compiled for each instruction set by a file that defines
// RVAE_LANES (and the name of its table) and includes this one. See simd_vector.h for why everything is anonymous.
#pragma once

#include <type_traits>

#include "cpu/simd_activation.h"
#include "cpu/simd_layout.h"
#include "cpu/simd_score.h"
#include "cpu/simd_vector.h"
#include "cpu/stack_kernels.h"

namespace {

using rvae::cpu::stack::BackwardEpilogue;
using rvae::cpu::stack::BackwardPrologue;
using rvae::cpu::stack::Epilogue;
using rvae::cpu::stack::Kernels;
using rvae::cpu::stack::Kind;
using rvae::cpu::stack::kPanel;
using rvae::cpu::stack::Norm;
using rvae::cpu::stack::Prologue;
using rvae::cpu::stack::Rows;
using rvae::cpu::stack::RowsOut;

struct None {};   // stands for a matrix that is not there
struct Pairs {};  // an operand of bf16 in pairs of rows

template <class T>
RVAE_INLINE const T* row(Rows m, int64_t r, int64_t ld) {
  return static_cast<const T*>(m.data) + r * ld;
}
template <class T>
RVAE_INLINE T* row(RowsOut m, int64_t r, int64_t ld) {
  return static_cast<T*>(m.data) + r * ld;
}

template <class T>
constexpr bool present = true;
template <>
constexpr bool present<None> = false;

// The same of a matrix that may not be there: its pointer is not to be used then.
template <class T>
RVAE_INLINE const T* row_if(Rows m, int64_t r, int64_t ld) {
  if constexpr (present<T>) return row<T>(m, r, ld);
  return nullptr;
}
template <class T>
RVAE_INLINE T* row_if(RowsOut m, int64_t r, int64_t ld) {
  if constexpr (present<T>) return row<T>(m, r, ld);
  return nullptr;
}

template <class T>
struct Element {
  using type = T;
};
// Two kinds of storage meet in every step, the first at least as wide as the second: the residual stream keeps the dtype
// of the input, what is inside a unit has the dtype of the products. Calls f(Element<first>{}, Element<second>{}).
template <class F>
RVAE_INLINE void with_elements(Kind first, Kind second, F f) {
  if (second == Kind::f32) return f(Element<float>{}, Element<float>{});
  if (first == Kind::f32) return f(Element<float>{}, Element<uint16_t>{});
  f(Element<uint16_t>{}, Element<uint16_t>{});
}

// --------------------------------------------------------------------------------------------------------- before a product

// Calls f(first, count) for the rows in groups of kGroup, `count` a constant. Rows of a group share the loads of what belongs to a column.
constexpr int kGroup = 4;
template <int N>
struct Count {
  static constexpr int value = N;
};
template <class F>
RVAE_INLINE void for_groups(int64_t rows, F f) {
  int64_t r = 0;
  for (; r + kGroup <= rows; r += kGroup) f(r, Count<kGroup>{});
  for (; r + 2 <= rows; r += 2) f(r, Count<2>{});
  if (r < rows) f(r, Count<1>{});
}

// An operand's columns behind its last vector, up to a whole panel: products may take them, and a wider layer may have left what is no number.
template <class Operand>
RVAE_INLINE void clear_panels(Operand* operand, int rows, int64_t ld, int64_t width) {
  if constexpr (present<Operand>) {
    for (int64_t c = (width + kLanes - 1) / kLanes * kLanes; c % kPanel != 0; c += kLanes) {
      for (int i = 0; i < rows; ++i) store(operand + i * ld + c, vf{}, Full{});
    }
  }
}

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
        using S = typename decltype(source)::type;
        p.residual.data == nullptr ? prologue_rows<A, S, None, None, Pairs>(p) : prologue_rows<A, S, S, None, Pairs>(p);
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

constexpr int kVectors = kPanel / kLanes;

// Calls f(v, c, lanes) for each vector of a panel of which `columns` columns are inside the matrix.
template <class F>
RVAE_INLINE void for_panel(int64_t columns, F f) {
  if (columns == kPanel) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) f(v, v * kLanes, Full{});
  } else {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int left = static_cast<int>(columns) - v * kLanes;
      if (left >= kLanes) {
        f(v, v * kLanes, Full{});
      } else if (left > 0) {
        f(v, v * kLanes, Tail{left});
      }
    }
  }
}

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
  const auto pass = [&](auto whole) {
    for (int64_t r = 0; r < rows; ++r) {
      const auto step = [&](int v, int c, auto lanes) {
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
      };
      if constexpr (decltype(whole)::value) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) step(v, v * kLanes, Full{});
      } else {
        for_panel(columns, step);
      }
    }
  };
  columns == kPanel ? pass(Count<1>{}) : pass(Count<0>{});
  if constexpr (Moments) {
    const float share = 1.0f / static_cast<float>(rows);
    constexpr float kFar = 2.0f;
    bool far = false;
    for (int v = 0; v < kVectors; ++v) far |= any(sum[v] * sum[v] * share > (squares[v] - sum[v] * sum[v] * share) * kFar);
    if (far) {
      for (int v = 0; v < kVectors; ++v) pivot[v] += sum[v] * share, sum[v] = squares[v] = vf{};
      for (int64_t r = 0; r < rows; ++r) {
        for_panel(columns, [&](int v, int c, auto lanes) {
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

// ---------------------------------------------------------------------------------------------------------------- backward

template <class Dz, class R, class Carried, class Out, class Operand>
void backward_prologue_rows(const BackwardPrologue& p) {
  const int64_t width = p.width, ld_operand = p.ld_operand;
  const float *const mean = p.mean, *const c1 = p.c1, *const c2 = p.c2, *const c3 = p.c3;
  float* const column_sum = p.column_sum;
  for_groups(p.rows, [&](int64_t first, auto group) {
    constexpr int rows = decltype(group)::value;
    const auto* const dz = row_if<Dz>(p.dz, first, width);
    const auto* const raw = row_if<R>(p.r, first, width);
    const auto* const carried = row_if<Carried>(p.carried, first, width);
    auto* const out = row_if<Out>(p.carried_out, first, width);
    auto* const operand = row_if<Operand>(p.operand, first, ld_operand);
    for_columns(width, [&](int64_t c, auto lanes) {
      vf m{}, k1{}, k2{}, k3{}, sum{};
      if constexpr (present<Dz>) {
        m = load(mean + c, Full{});
        k1 = load(c1 + c, Full{});
        k2 = load(c2 + c, Full{});
        k3 = load(c3 + c, Full{});
      }
#pragma GCC unroll 4
      for (int i = 0; i < rows; ++i) {
        vf dy{};
        if constexpr (present<Dz>) {
          const vf centred = load(raw + i * width + c, lanes) - m;
          dy = (load(dz + i * width + c, lanes) - k2 - k3 * centred) * k1;
        }
        if constexpr (present<Carried>) dy += load(carried + i * width + c, lanes);
        if constexpr (present<Out>) store(out + i * width + c, dy, lanes);
        dy = inside(dy, lanes);
        if constexpr (present<Operand>) store(operand + i * ld_operand + c, dy, Full{});
        sum += dy;
      }
      if (column_sum != nullptr) store(column_sum + c, load(column_sum + c, Full{}) + sum, Full{});
    });
    clear_panels(operand, rows, ld_operand, width);
  });
}

void backward_prologue(const BackwardPrologue& p) {
  if (p.dz.data == nullptr) {
    return with_elements(p.carried.kind, p.operand.kind, [&](auto carried, auto operand) {
      backward_prologue_rows<None, None, typename decltype(carried)::type, None, typename decltype(operand)::type>(p);
    });
  }
  if (p.carried_out.data != nullptr) {  // r is on the stream
    return with_elements(p.r.kind, p.dz.kind, [&](auto stream, auto compute) {
      using S = typename decltype(stream)::type;
      using T = typename decltype(compute)::type;
      if (p.operand.data != nullptr) return backward_prologue_rows<T, S, S, S, T>(p);
      if (p.carried.data != nullptr) return backward_prologue_rows<T, S, S, S, None>(p);
    });
  }
  with_elements(p.dz.kind, p.r.kind, [&](auto dz, auto compute) {
    using T = typename decltype(compute)::type;
    backward_prologue_rows<typename decltype(dz)::type, T, None, None, T>(p);
  });
}

// At the end of a post-activation unit (Unit) the gradient of the stream is added before, its input after.
template <Activation A, class R, bool Unit, class Out>
void backward_epilogue_rows(const BackwardEpilogue& p) {
  const vf slope = splat(p.slope);
  const int64_t width = p.width, rows = p.rows, columns = p.columns;
  const float* const strip = p.strip;
  const R* const raw = row<R>(p.r, 0, width);
  const Out* const carried = Unit ? row<Out>(p.carried, 0, width) : nullptr;
  const Out* const residual = Unit ? row<Out>(p.residual, 0, width) : nullptr;
  Out* const out = row<Out>(p.out, 0, width);
  vf mean[kVectors], rstd[kVectors], scale[kVectors], beta[kVectors], sum[kVectors] = {}, sum_xhat[kVectors] = {};
  for (int v = 0; v < kVectors; ++v) {
    mean[v] = load(p.norm.mean + v * kLanes, Full{});
    rstd[v] = load(p.norm.rstd + v * kLanes, Full{});
    scale[v] = load(p.norm.scale + v * kLanes, Full{});
    beta[v] = load(p.norm.beta + v * kLanes, Full{});
  }
  const auto pass = [&](auto whole) {
    for (int64_t r = 0; r < rows; ++r) {
      const auto step = [&](int v, int c, auto lanes) {
        const int64_t at = r * width + c;
        vf g = load(strip + r * kPanel + c, Full{});
        if constexpr (Unit) g += load(carried + at, lanes);
        const vf centred = load(raw + at, lanes) - mean[v];
        vf z = centred * scale[v] + beta[v];
        if constexpr (Unit) z += load(residual + at, lanes);
        // The sums are of what is stored: the BatchNorm's rule subtracts one from the other.
        const vf dz = as_stored<Out>(activate_backward<A>(g, z, slope));
        store(out + at, dz, lanes);
        sum[v] += dz;
        sum_xhat[v] += dz * (centred * rstd[v]);
      };
      if constexpr (decltype(whole)::value) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) step(v, v * kLanes, Full{});
      } else {
        for_panel(columns, step);
      }
    }
  };
  columns == kPanel ? pass(Count<1>{}) : pass(Count<0>{});
  for (int v = 0; v < kVectors; ++v) {
    store(p.sum_dz + v * kLanes, sum[v], Full{});
    store(p.sum_dz_xhat + v * kLanes, sum_xhat[v], Full{});
  }
}

template <class Out>
void add_rows(const BackwardEpilogue& p) {
  for (int64_t r = 0; r < p.rows; ++r) {
    for_panel(p.columns, [&](int, int c, auto lanes) {
      const vf g = load(p.strip + r * kPanel + c, Full{}) + load(row<Out>(p.carried, r, p.width) + c, lanes);
      store(row<Out>(p.out, r, p.width) + c, g, lanes);
    });
  }
}

void backward_epilogue(const BackwardEpilogue& p) {
  if (p.norm.mean == nullptr) {
    return with_elements(p.out.kind, p.out.kind, [&](auto out, auto) { add_rows<typename decltype(out)::type>(p); });
  }
  with_activation(p.activation, [&](auto activation) {
    constexpr Activation A = decltype(activation)::value;
    if (p.residual.data == nullptr) {
      return with_elements(p.r.kind, p.out.kind, [&](auto raw, auto out) {
        backward_epilogue_rows<A, typename decltype(raw)::type, false, typename decltype(out)::type>(p);
      });
    }
    with_elements(p.out.kind, p.r.kind, [&](auto out, auto raw) {
      backward_epilogue_rows<A, typename decltype(raw)::type, true, typename decltype(out)::type>(p);
    });
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
