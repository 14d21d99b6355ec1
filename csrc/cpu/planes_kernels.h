// What planes.cpp (the search, the planes, threads) and the kernels compiled for each instruction set agree on.
// Includes no torch header, so that the ISA files may include it.
#pragma once

#include <cstdint>

namespace rvae::cpu::planes {

constexpr int64_t kPanel = 32;  // columns of a right-hand side that stand together
constexpr int64_t kBlock = 8;   // rows that a product takes at a time

struct Kernels {
  // out[kBlock, kPanel] = rows^T * panel, with rows [depth, kBlock] and panel [depth, kPanel]. hits[kBlock]: for each row a
  // bit for each element that is at most the row's limit. What comes out for a row does not depend on the rows beside it.
  // Returns whether there are any hits.
  bool (*product)(const float* panel, int64_t depth, const float* rows, const float* limit, float* out, uint32_t* hits);
  // |a - b|^2
  float (*squared_distance)(const float* a, const float* b, int64_t width);
  // around[count, stride] = the rows `which` of `rows`, and target, less the mean of those rows; zeros up to stride.
  void (*gather)(const float* rows, int64_t width, const int64_t* which, int64_t count, float* around, int64_t stride, float* target);
  // products[count, count] = around * around^T, the lower triangle, and right[count] = around * target.
  void (*products)(const float* around, int64_t count, int64_t stride, const float* target, float* products, float* right);
  // |target - point * around|^2
  double (*residual)(const float* around, int64_t count, int64_t stride, const float* target, const float* point);
};

extern const Kernels portable_kernels, avx2_kernels, avx512_kernels;  // the last two where they were compiled

}  // namespace rvae::cpu::planes
