// One layer of a residual block on Hopper (sm_90a), forward, as one persistent kernel.
//
//   out[rows, COLUMNS] = epilogue(prologue(inputs[rows, SUM]) @ packed weight)
//
// prologue  h = activation((x - mean) * scale + shift), rounded to bf16
// epilogue  y = product + bias + residual; mean and centred second moment of y's columns (as rounded)
//
// Compile-time numbers: ACT (order of ACTIVATIONS in __init__.py), KC = SUM / 64, CL = CTAs of
// a cluster (1 or 2), SPLIT = CTAs that share the columns of a tile of rows (blockIdx.y; where there are few rows), each
// of which applies the prologue for itself, PANELS = COLUMNS / 128 / SPLIT.
//
// A CTA takes tiles of 128 rows, one after the other. Its warps:
//   * 4 "producers" read the inputs, apply the prologue and write the tile as bf16 chunks of 128 rows x 64 into A slots,
//     and prefetch the next tile and what the epilogue will read into L2;
//   * 2 pairs of warpgroups, "consumers": a pair computes a panel of 128 columns (64 rows a warpgroup, m64n128k16) and
//     does its epilogue while the other pair computes the next one. One thread of the pair that computes copies packed
//     128 x 64 blocks of the weight into a ring of W stages (the CTAs of a cluster copy a part each, to all of them).
// A slots are freed one by one while the last panel of a tile passes over them, so that the next tile can follow.
// Where the whole weight fits beside the A slots (RESIDENT), it is copied once.
//
// Shared-memory operands are K-major with the 128-byte swizzle: row r, 16-byte piece c at r * 128 + ((c ^ (r & 7)) << 4).
// The rows of a packed block are in the order that gives each thread's accumulators 8 consecutive columns: position
// 8 j + 2 q + e of 32 holds column 8 q + 2 j + e, so the epilogue reads and writes 16 bytes a thread without a shuffle.

#include "consumers.cuh"
#include "layout.cuh"
#include "producers.cuh"
#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
#if CL > 1
    __cluster_dims__(CL, 1, 1)
#endif
        layer(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) char memory[];
    const u32 slots = shared_address(memory), stages = slots + SLOTS * BLOCK;
    float* const scratch = (float*)(memory + (SLOTS + STAGES) * BLOCK);  // 2 pairs x 2 numbers x 8 warps x 128 columns
    const u32 barriers = stages + STAGES * BLOCK + 16384;
    const u32 slot_full = barriers, slot_empty = slot_full + 8 * SLOTS;
    const u32 stage_full = slot_empty + 8 * SLOTS, stage_empty = stage_full + 8 * STAGES;
    if (slots & 1023) __trap();
    if (threadIdx.x == 0) {
        for (int i = 0; i < SLOTS; ++i) {
            barrier_init(slot_full + 8 * i, PRODUCERS / 32);
            barrier_init(slot_empty + 8 * i, PANELS > 1 ? 16 : 8);  // warps of the pairs that compute with a tile
        }
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(stage_full + 8 * i, 1);
            barrier_init(stage_empty + 8 * i, 8 * CL);  // warps of a pair, in every CTA
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    cluster_barrier();
    // The CTAs of a cluster take neighbouring tiles, the same number of them; the last may lie beyond the rows.
    const int first = blockIdx.x, step = gridDim.x;
    if (threadIdx.x < CONSUMERS) {
        consume(a, slots, slot_full, slot_empty, stages, stage_full, stage_empty, scratch);
    } else {
        produce(a, slots, slot_full, slot_empty, first, step);
    }
    __syncwarp();
    cluster_barrier();  // no CTA leaves while the other may write into it or arrive on its barriers
}
