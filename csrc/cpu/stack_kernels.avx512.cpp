#define RVAE_LANES 16
#include "cpu/stack_kernels_impl.h"

namespace rvae::cpu::stack {

const Kernels* avx512_kernels() {
  static constexpr Kernels table = make_kernels("avx512");
  return &table;
}

}  // namespace rvae::cpu::stack
