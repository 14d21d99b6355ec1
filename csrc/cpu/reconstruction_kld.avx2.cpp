// reconstruction_kld for CPUs with AVX2.
#include "vec_avx2.h"

#include "reconstruction_kld_kernels.h"

namespace rvae::cpu::loss {

using Set = FloatKernels<Vec>;
extern const Kernels avx2_kernels;
const Kernels avx2_kernels = {Set::forward, Set::backward, Set::kld_forward_for, Set::kld_backward_for};

}  // namespace rvae::cpu::loss
