#include "cpu/stack_memory.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace rvae::cpu::stack {

namespace {

constexpr size_t kLarge = size_t{1} << 20, kHugePage = size_t{1} << 21, kMostIdle = size_t{256} << 20;

struct Block {
  void* data;
  size_t size;
};

class Pool : public c10::Allocator {
 public:
  // Never destroyed: tensors may outlive the module's static variables.
  static Pool& instance() {
    static Pool* const pool = new Pool;
    return *pool;
  }

  c10::DataPtr allocate(size_t bytes) override {
    const size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    auto* const block = new Block{nullptr, size};
    if (!take(*block)) {
      block->data = make(size);
      if (block->data == nullptr) {
        delete block;
        throw std::bad_alloc();
      }
    }
    return {block->data, block, [](void* context) { instance().give(static_cast<Block*>(context)); }, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  Pool() {
#if defined(__linux__)
    // A child must not find the lock taken by a thread that it does not have.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); }, [] { instance().mutex_.unlock(); });
#endif
  }

  // The smallest idle block that is large enough, and not by so much that a larger request would miss it.
  bool take(Block& wanted) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = idle_.end();
    for (auto block = idle_.begin(); block != idle_.end(); ++block) {
      const bool fits = block->size >= wanted.size && block->size <= wanted.size + wanted.size / 4;
      if (fits && (best == idle_.end() || block->size < best->size)) best = block;
    }
    if (best == idle_.end()) return false;
    wanted = *best;
    idle_bytes_ -= best->size;
    idle_.erase(best);
    return true;
  }

  void give(Block* block) {
    std::list<Block> dropped;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      idle_.push_front(*block);
      idle_bytes_ += block->size;
      while (idle_bytes_ > kMostIdle) {
        idle_bytes_ -= idle_.back().size;
        dropped.splice(dropped.end(), idle_, std::prev(idle_.end()));
      }
    }
    for (const Block& old : dropped) std::free(old.data);
    delete block;
  }

  static void* make(size_t size) {
    void* const data = std::aligned_alloc(kHugePage, size);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (data != nullptr) madvise(data, size, MADV_HUGEPAGE);  // advice: refusal changes nothing
#endif
    return data;
  }

  std::mutex mutex_;
  std::list<Block> idle_;  // the last used first
  size_t idle_bytes_ = 0;
};

}  // namespace

at::Tensor empty_large(at::IntArrayRef sizes, at::TensorOptions options) {
  const at::ScalarType dtype = c10::typeMetaToScalarType(options.dtype());
  size_t bytes = c10::elementSize(dtype);
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  c10::Allocator* const allocator = bytes < kLarge ? c10::GetCPUAllocator() : static_cast<c10::Allocator*>(&Pool::instance());
  return at::detail::empty_generic(sizes, allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt);
}

}  // namespace rvae::cpu::stack
