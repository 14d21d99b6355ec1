// The planes for CPUs with AVX-512.
#include "vec_avx512.h"

#include "planes_kernels_impl.h"

namespace rvae::cpu::planes {

extern const Kernels avx512_kernels;
const Kernels avx512_kernels = KernelsOver<Vec>::table();

}  // namespace rvae::cpu::planes
