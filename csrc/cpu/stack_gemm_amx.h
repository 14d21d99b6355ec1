// bf16 products on AMX's tile registers. The micro-kernels that torch carries reach the same rate, but look a kernel up, allocate and
// configure the tiles at every call, which is a twentieth of a training step of width 256.
#pragma once

#include <cstdint>

namespace rvae::cpu::stack {

// As `multiply` of stack_gemm.h for bf16; `k` is a multiple of 32, and `a` can be read for whole blocks of 16 rows.
void amx_multiply(int64_t m, int64_t k, const void* a, int64_t lda, const void* b, int64_t ldb, float* c, int64_t ldc, bool add);

// Gives this thread's tile registers back.
void amx_release();

}  // namespace rvae::cpu::stack
