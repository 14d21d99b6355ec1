// The kernels of the planes over a vector type V (vec_*.h). Include after one of these; everything here has internal linkage.
#pragma once

#include "planes_kernels.h"

namespace rvae::cpu::planes {
namespace {

template <class V>
struct KernelsOver {
  using Reg = typename V::Reg;
  static constexpr int W = V::width;

  static bool product(const float* panel, int64_t depth, const float* rows, const float* limit, float* out, uint32_t* hits) {
    constexpr int kRegs = kPanel / W;
    constexpr int kRows = kRegs == 2 ? 8 : kRegs == 4 ? 2 : 1;  // accumulators: 16, or 8 where there are 16 registers
    uint32_t any = 0;
    for (int64_t first = 0; first < kBlock; first += kRows) {
      Reg sums[kRows][kRegs];
      for (auto& row : sums) {
        for (auto& sum : row) sum = V::set(0);
      }
      for (int64_t d = 0; d < depth; ++d) {
        Reg columns[kRegs];
        for (int j = 0; j < kRegs; ++j) columns[j] = V::load(panel + d * kPanel + j * W);
        for (int r = 0; r < kRows; ++r) {
          const Reg value = V::set(rows[d * kBlock + first + r]);
          for (int j = 0; j < kRegs; ++j) sums[r][j] = V::fma(value, columns[j], sums[r][j]);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        const Reg most = V::set(limit[first + r]);
        uint32_t found = 0;
        for (int j = 0; j < kRegs; ++j) {
          V::store(out + (first + r) * kPanel + j * W, sums[r][j]);
          found |= V::at_most(sums[r][j], most) << (j * W);
        }
        hits[first + r] = found;
        any |= found;
      }
    }
    return any != 0;
  }

  static float squared_distance(const float* a, const float* b, int64_t width) {
    constexpr int kUnroll = 4;
    Reg sums[kUnroll] = {V::set(0), V::set(0), V::set(0), V::set(0)};
    const auto term = [&](Reg x, Reg y, Reg sum) {
      const Reg d = x - y;
      return V::fma(d, d, sum);
    };
    int64_t i = 0;
    for (; i + kUnroll * W <= width; i += kUnroll * W) {
      for (int u = 0; u < kUnroll; ++u) sums[u] = term(V::load(a + i + u * W), V::load(b + i + u * W), sums[u]);
    }
    for (; i + W <= width; i += W) sums[0] = term(V::load(a + i), V::load(b + i), sums[0]);
    if (i < width) {
      const int n = static_cast<int>(width - i);
      sums[1] = term(V::load(a + i, n, 0), V::load(b + i, n, 0), sums[1]);
    }
    return V::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }

  static void gather(const float* rows, int64_t width, const int64_t* which, int64_t count, float* around, int64_t stride,
                     float* target) {
    const Reg share = V::set(1.0f / static_cast<float>(count));
    const auto step = [&](int64_t i, auto... n) {
      Reg mean = V::set(0);
      for (int64_t r = 0; r < count; ++r) mean = mean + V::load(rows + which[r] * width + i, n..., float(n * 0)...);
      mean = mean * share;
      for (int64_t r = 0; r < count; ++r) {
        V::store(around + r * stride + i, V::load(rows + which[r] * width + i, n..., float(n * 0)...) - mean);
      }
      V::store(target + i, V::load(target + i) - mean);
    };
    int64_t i = 0;
    for (; i + W <= width; i += W) step(i);
    if (i < width) {  // beyond the width the mean, the rows and the target are zero
      step(i, static_cast<int>(width - i));
      i += W;
    }
    for (; i < stride; i += W) {
      for (int64_t r = 0; r < count; ++r) V::store(around + r * stride + i, V::set(0));
      V::store(target + i, V::set(0));
    }
  }

  // The products of R rows of `a` with C of `b`, into out[r * ldc + c].
  template <int R, int C>
  static void dots(const float* a, const float* b, int64_t stride, float* out, int64_t ldc) {
    Reg sums[R][C];
    for (auto& row : sums) {
      for (auto& sum : row) sum = V::set(0);
    }
    for (int64_t i = 0; i < stride; i += W) {
      Reg columns[C];
      for (int c = 0; c < C; ++c) columns[c] = V::load(b + c * stride + i);
      for (int r = 0; r < R; ++r) {
        const Reg value = V::load(a + r * stride + i);
        for (int c = 0; c < C; ++c) sums[r][c] = V::fma(value, columns[c], sums[r][c]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) out[r * ldc + c] = V::sum(sums[r][c]);
    }
  }

  static void products(const float* around, int64_t count, int64_t stride, const float* target, float* out, float* right) {
    constexpr int kSide = W == 16 ? 4 : 2;
    int64_t r = 0;
    for (; r + kSide <= count; r += kSide) {
      for (int64_t c = 0; c <= r; c += kSide) {
        dots<kSide, kSide>(around + r * stride, around + c * stride, stride, out + r * count + c, count);
      }
    }
    for (; r < count; ++r) {
      for (int64_t c = 0; c <= r; ++c) dots<1, 1>(around + r * stride, around + c * stride, stride, out + r * count + c, count);
    }
    for (r = 0; r < count; ++r) dots<1, 1>(around + r * stride, target, stride, right + r, 1);
  }

  static double residual(const float* around, int64_t count, int64_t stride, const float* target, const float* point) {
    double total = 0;
    for (int64_t i = 0; i < stride; i += W) {
      Reg rest = V::load(target + i);
      for (int64_t r = 0; r < count; ++r) rest = rest - V::set(point[r]) * V::load(around + r * stride + i);
      total += static_cast<double>(V::sum(rest * rest));
    }
    return total;
  }

  static constexpr Kernels table() { return {product, squared_distance, gather, products, residual}; }
};

}  // namespace
}  // namespace rvae::cpu::planes
