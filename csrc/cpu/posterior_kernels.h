// What posterior.cpp (checks, threads) and the kernels compiled for each instruction set agree on.
// Includes no torch header, so that the ISA files may include it.
#pragma once

#include <cstdint>

namespace rvae::cpu::posterior {

// Of the code and of its gradient; everything else is fp32.
enum class DType { Float32, BFloat16 };

// A row of the code is the means, then as many raw log variances. All but the code are [batch, latent], contiguous.
struct Forward {
  const void* code = nullptr;
  int64_t stride = 0;  // elements from one row of the code to the next
  int64_t latent = 0;
  float low = 0, high = 0;
  const float* noise = nullptr;
  float *mu = nullptr, *logvar = nullptr, *z = nullptr;
  float* slope = nullptr;   // d logvar / d raw; with `spread`, or neither
  float* spread = nullptr;  // d z / d logvar
};

struct Backward {
  const float *of_z = nullptr, *of_mu = nullptr, *of_logvar = nullptr;  // null: zero
  const float *slope = nullptr, *spread = nullptr;
  int64_t latent = 0;
  void* of_code = nullptr;  // [batch, 2 * latent], contiguous
};

// Each works on the rows [begin, end).
using ForwardFn = void (*)(const Forward&, int64_t begin, int64_t end);
using BackwardFn = void (*)(const Backward&, int64_t begin, int64_t end);

struct Kernels {
  ForwardFn (*forward)(DType code, bool keep);  // keep: slope and spread too
  BackwardFn (*backward)(DType code);
};

extern const Kernels portable_kernels, avx2_kernels, avx512_kernels;  // the last two where they were compiled

}  // namespace rvae::cpu::posterior
