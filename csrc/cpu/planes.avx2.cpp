// The planes for CPUs with AVX2.
#include "vec_avx2.h"

#include "planes_kernels_impl.h"

namespace rvae::cpu::planes {

extern const Kernels avx2_kernels;
const Kernels avx2_kernels = KernelsOver<Vec>::table();

}  // namespace rvae::cpu::planes
