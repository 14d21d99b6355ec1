// Instruction sets that this process may use, found at run time: the CPU has them *and* the operating system saves their
// registers. All false on other architectures than x86-64, where the portable code is the code.
//
// RVAE_FAST_CPU_ISA=portable|avx2|avx512|avx512bf16|amx in the environment caps the choice (read once), so that every path
// can be tested on one machine. It can only take sets away.
#pragma once

namespace rvae::cpu {

bool has_avx2();         // AVX2, FMA, F16C
bool has_avx512();       // has_avx2 and AVX-512 F, BW, VL, DQ
bool has_avx512_bf16();  // has_avx512 and AVX512_BF16
bool has_amx_bf16();     // has_avx512_bf16 and AMX tiles with bf16 products; asks Linux for the tile registers

}  // namespace rvae::cpu

// A table of kernels compiled for an instruction set, if it was compiled and may be used; else another one.
#ifdef RVAE_HAVE_AVX2
#define RVAE_IF_AVX2(table, otherwise) (::rvae::cpu::has_avx2() ? (table) : (otherwise))
#else
#define RVAE_IF_AVX2(table, otherwise) (otherwise)
#endif
#ifdef RVAE_HAVE_AVX512
#define RVAE_IF_AVX512(table, otherwise) (::rvae::cpu::has_avx512() ? (table) : (otherwise))
#else
#define RVAE_IF_AVX512(table, otherwise) (otherwise)
#endif
