#define RVAE_LANES 4
#include "cpu/stack_kernels_impl.h"

namespace rvae::cpu::stack {

const Kernels* portable_kernels() {
  static constexpr Kernels table = make_kernels("portable");
  return &table;
}

}  // namespace rvae::cpu::stack
