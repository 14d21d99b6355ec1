// The posterior for CPUs with AVX-512.
#include "vec_avx512.h"

#include "posterior_kernels_impl.h"

namespace rvae::cpu::posterior {

using Set = KernelsOver<Vec>;
extern const Kernels avx512_kernels;
const Kernels avx512_kernels = {Set::forward_for, Set::backward_for};

}  // namespace rvae::cpu::posterior
