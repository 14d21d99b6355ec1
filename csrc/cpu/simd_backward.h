// The elementwise steps of a stack's backward pass (stack_kernels.h), on the vectors of simd_vector.h.
#pragma once

#include "cpu/simd_activation.h"
#include "cpu/simd_rows.h"
#include "cpu/stack_kernels.h"

namespace {

using rvae::cpu::stack::BackwardEpilogue;
using rvae::cpu::stack::BackwardPrologue;

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
  for_strip(rows, columns, [&](int64_t r, int v, int c, auto lanes) {
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
  });
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

}  // namespace
