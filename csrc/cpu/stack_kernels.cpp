#include "cpu/stack_kernels.h"

#include "cpu/cpu_features.h"

namespace rvae::cpu::stack {

namespace {

const Kernels* best() {
#if defined(RVAE_HAVE_AVX512BF16)
  if (has_avx512_bf16()) return avx512bf16_kernels();
#endif
#if defined(RVAE_HAVE_AVX512)
  if (has_avx512()) return avx512_kernels();
#endif
#if defined(RVAE_HAVE_AVX2)
  if (has_avx2()) return avx2_kernels();
#endif
  return portable_kernels();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const table = best();
  return *table;
}

}  // namespace rvae::cpu::stack
