#define RVAE_LANES 8
#include "cpu/stack_kernels_impl.h"

namespace rvae::cpu::stack {

const Kernels* avx2_kernels() {
  static constexpr Kernels table = make_kernels("avx2");
  return &table;
}

}  // namespace rvae::cpu::stack
