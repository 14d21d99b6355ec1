// Checks that the ops of both stacks share. Every message names the op.
#pragma once

#include <ATen/core/List.h>

#include <string_view>
#include <vector>

#include "cpu/stack_pass.h"

namespace rvae::cpu::stack {

using Tensors = std::vector<at::Tensor>;

// `shape_of(i)` is what tensor i must have.
template <class F>
void check_shapes(const char* op, const char* name, const Tensors& tensors, size_t count, F shape_of) {
  TORCH_CHECK_VALUE(tensors.size() == count, op, ": ", name, " has ", tensors.size(), " tensors, expected ", count);
  for (size_t i = 0; i < count; ++i) {
    const at::Tensor& t = tensors[i];
    const std::vector<int64_t> shape = shape_of(i);
    TORCH_CHECK_VALUE(t.sizes() == at::IntArrayRef(shape), op, ": ", name, " must have shape ", at::IntArrayRef(shape), ", got ",
                      t.sizes());
    TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat && t.device().is_cpu(), op, ": ", name, " must be float32 on the CPU, got ",
                     t.scalar_type(), " on ", t.device());
  }
}

inline Activation parse_activation(const char* op, std::string_view name) {
  constexpr std::string_view names[] = {"identity", "relu", "leaky_relu", "elu", "silu", "gelu", "tanh"};
  for (int i = 0; i < 7; ++i) {
    if (name == names[i]) return static_cast<Activation>(i);
  }
  TORCH_CHECK_VALUE(false, op, ": activation is unknown: '", name, "'");
}

inline Tensors contiguous(const Tensors& tensors) {
  Tensors result;
  result.reserve(tensors.size());
  for (const auto& t : tensors) result.push_back(t.contiguous());
  return result;
}

inline std::vector<bool> flags(const c10::List<bool>& list) {
  return {list.begin(), list.end()};
}

// What both stacks have; the layers' widths are still to be filled in.
inline Shape make_common(const char* op, const at::Tensor& x, std::string_view activation, double slope, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16, op, ": dtype must be float32 or bfloat16 on the CPU, got ", dtype);
  const bool bf16 = dtype == at::kBFloat16;
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) > 0, op, ": x must have shape [batch, features], got ", x.sizes());
  TORCH_CHECK_TYPE(x.device().is_cpu() && (x.scalar_type() == at::kFloat || (bf16 && x.scalar_type() == at::kBFloat16)), op,
                   ": x must be float32 (or, for bf16 products, bfloat16) on the CPU, got ", x.scalar_type(), " on ", x.device());
  TORCH_CHECK(!bf16 || has_bf16_products(), op, ": this CPU has no bf16 products");
  Shape s;
  s.rows = x.size(0);
  s.activation = parse_activation(op, activation);
  s.slope = static_cast<float>(slope);
  s.stream = x.scalar_type() == at::kFloat ? Kind::f32 : Kind::bf16;
  s.compute = bf16 ? Kind::bf16 : Kind::f32;
  return s;
}

inline void check_rows(const char* op, const at::Tensor& x, bool batch_statistics) {
  TORCH_CHECK_VALUE(x.size(0) > (batch_statistics ? 1 : 0), op, ": x must have ",
                    batch_statistics ? "more than one row for statistics of the batch" : "at least one row", ", got ", x.sizes());
}

}  // namespace rvae::cpu::stack
