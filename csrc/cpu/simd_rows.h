// Walks over the rows of matrices that the steps of a stack read and write, on the vectors of simd_vector.h.
#pragma once

#include "cpu/simd_vector.h"
#include "cpu/stack_kernels.h"

namespace {

using rvae::cpu::stack::Kind;
using rvae::cpu::stack::kPanel;
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

// Calls f(row, v, c, lanes) for the vectors of a strip's rows; of whole panels, the usual ones, with nothing to look at in between.
template <class F>
RVAE_INLINE void for_strip(int64_t rows, int64_t columns, F f) {
  if (columns == kPanel) {
    for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) f(r, v, v * kLanes, Full{});
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) for_panel(columns, [&](int v, int c, auto lanes) { f(r, v, c, lanes); });
  }
}

}  // namespace
