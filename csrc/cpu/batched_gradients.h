// Gradients of many outputs at once (torch.autograd.grad with is_grads_batched, vectorised Jacobians): what comes in are batches
// under autograd's vmap, whose memory the kernels cannot read. Each is taken by itself.
#pragma once

#include <ATen/Functions.h>
#include <ATen/LegacyBatchedTensorImpl.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstdint>
#include <vector>

namespace rvae::cpu {

// run(incoming), a list of gradients of which some may be undefined; of batches, a list of batches.
template <typename Run>
torch::autograd::variable_list one_by_one(const torch::autograd::variable_list& incoming, const Run& run) {
  int64_t level = -1, count = 0;  // the innermost batch; its parts may be batches still
  for (const at::Tensor& t : incoming) {
    if (!t.defined()) continue;
    TORCH_CHECK(!t.key_set().has(c10::DispatchKey::FuncTorchBatched),
                "the native kernels' gradients cannot go through torch.vmap: put the forward pass inside it, too, or use "
                "rvae_fast.backend('reference')");
    const auto* batched = at::maybeGetBatchedImpl(t);
    if (batched == nullptr) continue;
    const at::BatchDim& last = batched->bdims().back();  // levels rise
    if (last.level() > level) {
      level = last.level();
      count = batched->value().size(last.dim());
    }
  }
  if (count == 0) return run(incoming);
  const auto part = [&](const at::Tensor& t, int64_t i) -> at::Tensor {
    const auto* batched = t.defined() ? at::maybeGetBatchedImpl(t) : nullptr;
    if (batched == nullptr || batched->bdims().back().level() != level) return t;
    const int64_t dim = batched->bdims().back().dim();
    at::BatchDims outer;
    for (const at::BatchDim& b : batched->bdims()) {
      if (b.level() != level) outer.emplace_back(b.level(), b.dim() - (b.dim() > dim ? 1 : 0));
    }
    const at::Tensor slice = batched->value().select(dim, i);
    return outer.empty() ? slice.contiguous() : at::makeBatched(slice, outer);
  };
  std::vector<torch::autograd::variable_list> found;
  for (int64_t i = 0; i < count; ++i) {
    torch::autograd::variable_list one;
    for (const at::Tensor& t : incoming) one.push_back(part(t, i));
    found.push_back(one_by_one(one, run));
  }
  torch::autograd::variable_list result(found[0].size());
  for (size_t k = 0; k < result.size(); ++k) {
    if (!found[0][k].defined()) continue;
    std::vector<at::Tensor> parts;
    for (const auto& one : found) parts.push_back(one[k]);
    result[k] = at::addBatchDim(at::stack(parts), level, 0);
  }
  return result;
}

}  // namespace rvae::cpu
