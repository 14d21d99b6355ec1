// The posterior for CPUs with AVX2.
#include "vec_avx2.h"

#include "posterior_kernels_impl.h"

namespace rvae::cpu::posterior {

using Set = KernelsOver<Vec>;
extern const Kernels avx2_kernels;
const Kernels avx2_kernels = {Set::forward_for, Set::backward_for};

}  // namespace rvae::cpu::posterior
