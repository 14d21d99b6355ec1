// reconstruction_kld for CPUs with AVX-512.
#include "vec_avx512.h"

#include "reconstruction_kld_kernels.h"

namespace rvae::cpu::loss {

using Set = FloatKernels<Vec>;
extern const Kernels avx512_kernels;
const Kernels avx512_kernels = {Set::forward, Set::backward, Set::kld_forward_for, Set::kld_backward_for};

}  // namespace rvae::cpu::loss
