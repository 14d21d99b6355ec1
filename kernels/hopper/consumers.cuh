// The consumers: copies of the weight and products. See layer.cu.
#pragma once

#include "epilogue.cuh"
#include "layout.cuh"
#include "ptx.cuh"

// This CTA's part of block ``block`` of the weight into a stage, in every CTA of the cluster.
__device__ __forceinline__ void fill(const Arguments& a, u32 stages, u32 full, u32 index, int block) {
    const u32 at = cluster_rank() * (BLOCK / CL);
    if (WITHOUT & 16) {
        barrier_expect(full + index * 8, 0);
        return;
    }
    barrier_expect(full + index * 8, BLOCK);  // from all parts
    bulk_copy(stages + index * BLOCK + at, a.weight + (blockIdx.y * PANELS * KC + block) * BLOCK + at, BLOCK / CL,
              full + index * 8);
}

__device__ __forceinline__ void consume(const Arguments& a, u32 slots, u32 slot_full, u32 slot_empty, u32 stages,
                                        u32 stage_full, u32 stage_empty, float* scratch) {
    const u32 pair = threadIdx.x >> 8;
    if (threadIdx.x == 0 && (int)(blockIdx.x - cluster_rank()) < a.tiles) {
#if RESIDENT
        const int ready = STAGES;
#else
        const int ready = AHEAD;
#endif
        for (int i = 0; i < ready; ++i) fill(a, stages, stage_full, i, i);
    }
    // The CTA's panels, counted through all of its tiles: every other one is the pair's. All else follows from the
    // number, so that little is kept in registers through the epilogue.
#pragma unroll 1
    for (u32 n = pair;; n += 2) {
        const u32 turn = n / PANELS, panel = n % PANELS;
        const int tile = blockIdx.x + turn * gridDim.x;
        if (tile - (int)cluster_rank() >= a.tiles) break;
        const bool frees = panel + 2 >= PANELS;  // the pair's last panel of this tile
        Ring slot = {turn * KC % SLOTS, turn * KC / SLOTS & 1};
#if RESIDENT
        Ring stage = {panel * KC, 0};
#else
        Ring stage = {n * KC % STAGES, n * KC / STAGES & 1};
#endif
        const u32 lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 7;  // warp of the pair: 16 rows
        const u32 rows_at = (warp >> 2) * 8192;                            // 64 rows of 128 bytes
        u32 old_slot = 0, old_stage = 0;
        float acc[64];
#pragma unroll
        for (int i = 0; i < 64; ++i) acc[i] = 0.0f;  // or ptxas takes the old ones to be alive through the epilogue
        if (n > 0) turn_wait(pair);
#pragma unroll 1
        for (int kc = 0; kc < KC; ++kc) {
            barrier_wait(slot_full + slot.index * 8, slot.phase);
            barrier_wait(stage_full + stage.index * 8, stage.phase);
            const u64 da = descriptor(slots + slot.index * BLOCK + rows_at);
            const u64 db = descriptor(stages + stage.index * BLOCK);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < (WITHOUT & 1 ? 0 : 4); ++k) wgmma(acc, da + 2 * k, db + 2 * k, 1);
            wgmma_commit();
            if (kc + 1 == KC && (panel + 1 < PANELS || tile + (int)(gridDim.x - cluster_rank()) < a.tiles))
                turn_give(pair ^ 1);  // if there is a next panel
            if (kc > 0) {
                wgmma_wait<1>();  // what the step before read is free
                if (!RESIDENT && lane < CL) barrier_arrive_at(stage_empty + old_stage * 8, lane);
                if (frees && lane == 0) barrier_arrive(slot_empty + old_slot * 8);
            }
#if !RESIDENT
            if (lane == 0 && warp == 0) {  // copy into the stage that the step before the last one has read
                int block = panel * KC + kc + AHEAD;
                const bool wraps = block >= PANELS * KC;
                if (wraps) block -= PANELS * KC;
                if (!wraps || tile + (int)(gridDim.x - cluster_rank()) < a.tiles) {
                    Ring next = stage;
                    next.advance<STAGES>(AHEAD);
                    barrier_wait(stage_empty + next.index * 8, next.phase ^ 1);
                    fill(a, stages, stage_full, next.index, block);
                }
            }
#endif
            __syncwarp();
            old_slot = slot.index;
            old_stage = stage.index;
            slot.advance<SLOTS>(1);
            stage.advance<STAGES>(1);
        }
        wgmma_wait<0>();
        if (!RESIDENT && lane < CL) barrier_arrive_at(stage_empty + old_stage * 8, lane);
        if (frees && lane == 0) barrier_arrive(slot_empty + old_slot * 8);
        if (WITHOUT & 8) {
#pragma unroll
            for (int i = 0; i < 64; ++i) asm volatile("" ::"f"(acc[i]));
        } else {
            epilogue(acc, a, scratch, tile, blockIdx.y * PANELS + panel);
        }
    }
}
