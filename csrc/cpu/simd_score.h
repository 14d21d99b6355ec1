// Elementwise steps of a frozen network on one strip of a tile (rows x 32 columns, fp32), on the vectors of simd_vector.h.
#pragma once

#include "cpu/simd_activation.h"
#include "cpu/simd_vector.h"
#include "cpu/stack_kernels.h"

namespace {

using rvae::cpu::stack::Kind;
using rvae::cpu::stack::kPanel;
using rvae::cpu::stack::ScoreError;
using rvae::cpu::stack::ScoreStep;

template <int R>
void score_product_rows(int64_t reduced, const float* a, int64_t ld, const float* b, float* c, bool add) {
  constexpr int vectors = kPanel / kLanes;
  vf sum[R][vectors] = {};
  for (int64_t k = 0; k < reduced; ++k) {
    for (int v = 0; v < vectors; ++v) {
      const vf column = load(b + k * kPanel + v * kLanes, Full{});
      for (int r = 0; r < R; ++r) sum[r][v] += splat(a[r * ld + k]) * column;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < vectors; ++v) {
      float* const to = c + r * kPanel + v * kLanes;
      store(to, add ? load(to, Full{}) + sum[r][v] : sum[r][v], Full{});
    }
  }
}

void score_product(int64_t rows, int64_t reduced, const float* a, int64_t ld, const float* b, float* c, bool add) {
  constexpr int at_once = kLanes == 16 ? 12 : kLanes == 8 ? 3 : 2;  // what the registers hold
  int64_t r = 0;
  for (; r + at_once <= rows; r += at_once) score_product_rows<at_once>(reduced, a + r * ld, ld, b, c + r * kPanel, add);
  for (; r < rows; ++r) score_product_rows<1>(reduced, a + r * ld, ld, b, c + r * kPanel, add);
}

// Row by row, a panel's vectors beside each other. Pointers and switches are copied to names of their own: through `p` the compiler would
// have to read them again behind every store, which may have changed them for all it knows.
template <Activation A, class Operand, bool Add, bool Keep>
void score_step_rows(const ScoreStep& p) {
  constexpr int vectors = kPanel / kLanes;
  const vf slope = splat(p.slope);
  vf bias[vectors], scale[vectors], shift[vectors];
  for (int v = 0; v < vectors; ++v) {
    const int c = v * kLanes;
    bias[v] = p.bias == nullptr ? vf{} : load(p.bias + c, Full{});
    scale[v] = p.scale == nullptr ? splat(1.0f) : load(p.scale + c, Full{});
    shift[v] = p.shift == nullptr ? vf{} : load(p.shift + c, Full{});
  }
  float* strip = p.strip;
  float* stream = p.stream;
  auto* operand = static_cast<Operand*>(p.operand.data);
  const int64_t ld_stream = p.ld_stream, ld_operand = operand == nullptr ? 0 : p.ld_operand;
  const bool first = p.activate_first, last = p.activate_last, keep_strip = p.store_strip;
  for (int64_t r = p.rows; r > 0; --r) {
    vf y[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      y[v] = load(strip + v * kLanes, Full{}) + bias[v];
      if constexpr (Add) y[v] += load(stream + v * kLanes, Full{});
      if (first) y[v] = activate<A>(y[v], slope);
      if constexpr (Keep) store(stream + v * kLanes, y[v], Full{});
      if (keep_strip) store(strip + v * kLanes, y[v], Full{});
      y[v] = y[v] * scale[v] + shift[v];
      if (last) y[v] = activate<A>(y[v], slope);
    }
    if (operand != nullptr) store_panel(operand, y);
    strip += kPanel;
    stream += ld_stream;
    operand += ld_operand;
  }
}

void score_step(const ScoreStep& p) {
  with_activation(p.activate_first || p.activate_last ? p.activation : Activation::identity, [&](auto activation) {
    constexpr Activation A = decltype(activation)::value;
    const auto rows = [&](auto operand) {
      using T = decltype(operand);
      if (p.add_stream) return p.store_stream ? score_step_rows<A, T, true, true>(p) : score_step_rows<A, T, true, false>(p);
      p.store_stream ? score_step_rows<A, T, false, true>(p) : score_step_rows<A, T, false, false>(p);
    };
    p.operand.kind == Kind::f32 ? rows(float{}) : rows(uint16_t{});
  });
}

// log(1 + t) for t in [0, 1]: 2 artanh(t / (2 + t)).
RVAE_INLINE vf log1p_unit(vf t) {
  const vf s = t / (t + 2.0f);
  const vf q = s * s;
  vf p = q * (2.0f / 15.0f) + 2.0f / 13.0f;
  p = p * q + 2.0f / 11.0f;
  p = p * q + 2.0f / 9.0f;
  p = p * q + 2.0f / 7.0f;
  p = p * q + 2.0f / 5.0f;
  p = p * q + 2.0f / 3.0f;
  p = p * q + 2.0f;
  return p * s;
}

// The terms are written over the strip and added up from there, whether or not somebody wants them: a term that is only
// added may be contracted into a fused multiply-add, and a score must not depend on what else was asked for.
template <class Term>
void score_error_rows(const ScoreError& p, Term term) {
  for (int64_t r = 0; r < p.rows; ++r) {
    float* const strip = p.strip + r * kPanel;
    vf sum{};
    for_columns(p.columns, [&](int64_t c, auto lanes) {
      const vf e = inside(term(load(strip + c, lanes), load(p.x + r * p.width + c, lanes)), lanes);
      store(strip + c, e, Full{});
      if (p.feature_error != nullptr) store(p.feature_error + r * p.width + c, e, lanes);
      sum += e;
    });
    p.error[r] += total(sum);
  }
}

void score_error(const ScoreError& p) {
  if (p.reconstruction != nullptr) {
    for (int64_t r = 0; r < p.rows; ++r) {
      for_columns(p.columns, [&](int64_t c, auto lanes) {
        const vf y = load(p.strip + r * kPanel + c, lanes);
        store(p.reconstruction + r * p.width + c, p.likelihood == 2 ? sigmoid(y) : y, lanes);
      });
    }
  }
  if (p.likelihood == 0) {
    score_error_rows(p, [](vf y, vf x) { return (y - x) * (y - x); });
  } else if (p.likelihood == 1) {
    score_error_rows(p, [](vf y, vf x) {
      const vf d = y - x;
      return d < 0.0f ? -d : d;
    });
  } else {
    score_error_rows(p, [](vf z, vf x) {
      const vf magnitude = z < 0.0f ? -z : z;
      return (z < 0.0f ? vf{} : z) - z * x + log1p_unit(exp(-magnitude));
    });
  }
}

}  // namespace
