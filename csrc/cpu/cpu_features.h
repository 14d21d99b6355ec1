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
