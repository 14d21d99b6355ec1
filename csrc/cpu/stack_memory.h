// Memory for what a stack keeps, returns and computes in: blocks that are used again.
#pragma once

#include <ATen/core/Tensor.h>

namespace rvae::cpu::stack {

// Uninitialised, on the CPU. Where it is large (a megabyte and more) its memory is asked of the system in huge pages, and
// goes into a pool when the tensor dies. What a training step takes, it takes again in the next step, megabytes of it, and
// the system hands out zeroed pages one by one: for a stack of width 784 on 256 rows that was a tenth of the step, and pages
// whose last contents are in the cache are quicker than new ones. At most 256 MB lie idle in the pool; the least recently
// used go back to the system.
at::Tensor empty_large(at::IntArrayRef sizes, at::TensorOptions options);

}  // namespace rvae::cpu::stack
