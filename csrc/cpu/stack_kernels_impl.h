// The functions of stack_kernels.h, written once on vectors and compiled for each instruction set by a file that defines
// RVAE_LANES (and the name of its table) and includes this one. See simd_vector.h for why everything is anonymous.
#pragma once

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

struct None {};  // stands for a matrix that is not there

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

template <Activation A, class Source, class Residual, class Stream, class Operand>
void prologue_rows(const Prologue& p) {
  const vf slope = splat(p.slope);
  for (int64_t r = 0; r < p.rows; ++r) {
    for_columns(p.width, [&](int64_t c, auto lanes) {
      vf h = load(row<Source>(p.source, r, p.width) + c, lanes);
      if (p.norm.mean != nullptr) {
        h = (h - load(p.norm.mean + c, Full{})) * load(p.norm.scale + c, Full{}) + load(p.norm.beta + c, Full{});
      }
      if constexpr (present<Residual>) h += load(row<Residual>(p.residual, r, p.width) + c, lanes);
      h = activate<A>(h, slope);
      if constexpr (present<Stream>) store(row<Stream>(p.stream, r, p.width) + c, h, lanes);
      if constexpr (present<Operand>) store(row<Operand>(p.operand, r, p.ld_operand) + c, inside(h, lanes), Full{});
    });
  }
}

void prologue(const Prologue& p) {
  with_activation(p.activate ? p.activation : Activation::identity, [&](auto activation) {
    constexpr Activation A = decltype(activation)::value;
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

template <class Residual, class Out>
void epilogue_rows(const Epilogue& p) {
  const bool moments = p.mean != nullptr;
  vf bias[kVectors] = {};
  if (p.bias != nullptr) for_panel(p.columns, [&](int v, int c, auto lanes) { bias[v] = load(p.bias + c, lanes); });
  vf sum[kVectors] = {};
  for (int64_t r = 0; r < p.rows; ++r) {
    float* strip = p.strip + r * kPanel;
    for_panel(p.columns, [&](int v, int c, auto lanes) {
      vf y = load(strip + c, Full{}) + bias[v];
      if constexpr (present<Residual>) y += load(row<Residual>(p.residual, r, p.width) + c, lanes);
      if constexpr (present<Out>) {
        store(row<Out>(p.out, r, p.width) + c, y, lanes);
        if (moments) y = as_stored<Out>(y);  // the next layer normalises what it reads
      }
      if (moments) {
        store(strip + c, y, Full{});
        sum[v] += y;
      }
    });
  }
  if (!moments) return;
  // Two passes over the tile while it is in cache, and a correction for the rounding of the mean.
  const float share = 1.0f / static_cast<float>(p.rows);
  vf mean[kVectors], squares[kVectors] = {}, rest[kVectors] = {};
  for (int v = 0; v < kVectors; ++v) mean[v] = sum[v] * share;
  for (int64_t r = 0; r < p.rows; ++r) {
    const float* strip = p.strip + r * kPanel;
    for (int v = 0; v < kVectors; ++v) {
      const vf d = load(strip + v * kLanes, Full{}) - mean[v];
      rest[v] += d;
      squares[v] += d * d;
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    const vf shift = rest[v] * share;
    const vf m2 = squares[v] - rest[v] * shift;
    store(p.mean + v * kLanes, mean[v], Full{});
    store(p.shift + v * kLanes, shift, Full{});
    // In a constant column of large numbers nothing but rounding is left, of either sign. (NaN stays NaN.)
    store(p.m2 + v * kLanes, m2 < 0.0f ? vf{} : m2, Full{});
  }
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
  for (int64_t r = 0; r < p.rows; ++r) {
    for_columns(p.width, [&](int64_t c, auto lanes) {
      vf dy{};
      if constexpr (present<Dz>) {
        const vf centred = load(row<R>(p.r, r, p.width) + c, lanes) - load(p.mean + c, Full{});
        dy = load(row<Dz>(p.dz, r, p.width) + c, lanes) - load(p.c2 + c, Full{}) - load(p.c3 + c, Full{}) * centred;
        dy *= load(p.c1 + c, Full{});
      }
      if constexpr (present<Carried>) dy += load(row<Carried>(p.carried, r, p.width) + c, lanes);
      if constexpr (present<Out>) store(row<Out>(p.carried_out, r, p.width) + c, dy, lanes);
      if constexpr (present<Operand>) store(row<Operand>(p.operand, r, p.ld_operand) + c, inside(dy, lanes), Full{});
      if (p.column_sum != nullptr) store(p.column_sum + c, load(p.column_sum + c, Full{}) + inside(dy, lanes), Full{});
    });
  }
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
  vf mean[kVectors], rstd[kVectors], scale[kVectors], beta[kVectors], sum[kVectors] = {}, sum_xhat[kVectors] = {};
  for (int v = 0; v < kVectors; ++v) {
    mean[v] = load(p.norm.mean + v * kLanes, Full{});
    rstd[v] = load(p.norm.rstd + v * kLanes, Full{});
    scale[v] = load(p.norm.scale + v * kLanes, Full{});
    beta[v] = load(p.norm.beta + v * kLanes, Full{});
  }
  for (int64_t r = 0; r < p.rows; ++r) {
    for_panel(p.columns, [&](int v, int c, auto lanes) {
      vf g = load(p.strip + r * kPanel + c, Full{});
      if constexpr (Unit) g += load(row<Out>(p.carried, r, p.width) + c, lanes);
      const vf centred = load(row<R>(p.r, r, p.width) + c, lanes) - mean[v];
      vf z = centred * scale[v] + beta[v];
      if constexpr (Unit) z += load(row<Out>(p.residual, r, p.width) + c, lanes);
      // The sums are of what is stored: the BatchNorm's rule subtracts one from the other.
      const vf dz = as_stored<Out>(activate_backward<A>(g, z, slope));
      store(row<Out>(p.out, r, p.width) + c, dz, lanes);
      sum[v] += dz;
      sum_xhat[v] += dz * (centred * rstd[v]);
    });
  }
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
      for (int v = 0; v < kVectors; ++v) store(strip + r * kPanel + v * kLanes, vf{}, Full{});
      for_panel(columns, [&](int, int c, auto lanes) {
        store(strip + r * kPanel + c, load(row<T>(source, r, width) + c, lanes), Full{});
      });
    }
  });
}

constexpr Kernels make_kernels(const char* isa) {
  return {isa,           prologue,     epilogue,        backward_prologue, backward_epilogue, load_strip,
          load_operand,  transpose_words, interleave_rows, spread_rows,     sum_buffers,       merge_moments,
          sum_tiles,     score_step,      score_error,     score_product};
}

}  // namespace
