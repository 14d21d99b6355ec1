// The posterior for any CPU.
#include "vec_portable.h"

#include "posterior_kernels_impl.h"

namespace rvae::cpu::posterior {

using Set = KernelsOver<Vec>;
const Kernels portable_kernels = {Set::forward_for, Set::backward_for};

}  // namespace rvae::cpu::posterior
