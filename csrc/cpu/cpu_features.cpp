#include "cpu_features.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace rvae::cpu {
namespace {

enum Level { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

#if defined(__x86_64__)

bool bit(uint32_t word, int index) { return (word >> index) & 1u; }

// The register states that the operating system saves on a context switch (extended control register 0).
uint64_t saved_states() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

bool tiles_permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Level detect() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return kPortable;
  const bool xsave = bit(c, 27), avx = bit(c, 28), fma = bit(c, 12), f16c = bit(c, 29);
  if (!(xsave && avx && fma && f16c)) return kPortable;
  const uint64_t states = saved_states();
  constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;
  if ((states & kYmm) != kYmm || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !bit(b, 5)) return kPortable;
  const bool f = bit(b, 16), dq = bit(b, 17), bw = bit(b, 30), vl = bit(b, 31);
  if (!(f && dq && bw && vl) || (states & kZmm) != kZmm) return kAvx2;
  const bool amx_bf16 = bit(d, 22), amx_tile = bit(d, 24);
  if (a < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !bit(a, 5)) return kAvx512;
  return amx_bf16 && amx_tile && (states & kTiles) == kTiles && tiles_permitted() ? kAmx : kAvx512Bf16;
}

#else

Level detect() { return kPortable; }

#endif

Level cap() {
  const char* name = std::getenv("RVAE_FAST_CPU_ISA");
  if (name == nullptr) return kAmx;
  const char* names[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};
  for (int level = kPortable; level <= kAmx; ++level) {
    if (std::strcmp(name, names[level]) == 0) return static_cast<Level>(level);
  }
  return kAmx;
}

Level level() {
  static const Level found = [] {
    const Level detected = detect(), allowed = cap();
    return detected < allowed ? detected : allowed;
  }();
  return found;
}

}  // namespace

bool has_avx2() { return level() >= kAvx2; }
bool has_avx512() { return level() >= kAvx512; }
bool has_avx512_bf16() { return level() >= kAvx512Bf16; }
bool has_amx_bf16() { return level() >= kAmx; }

}  // namespace rvae::cpu
