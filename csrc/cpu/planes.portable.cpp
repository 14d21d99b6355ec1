// The planes for any CPU.
#include "vec_portable.h"

#include "planes_kernels_impl.h"

namespace rvae::cpu::planes {

const Kernels portable_kernels = KernelsOver<Vec>::table();

}  // namespace rvae::cpu::planes
