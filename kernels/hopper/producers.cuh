// The producers: inputs, prologue, tiles of bf16 in shared memory. See layer.cu.
#pragma once

#include "layout.cuh"
#include "ptx.cuh"

// The activations are those of kernels/activations.py.
__device__ __forceinline__ float hyperbolic_tangent(float x) {
    float e = __expf(-2.0f * fabsf(x));
    float t = __fdividef(1.0f - e, 1.0f + e);
    return x < 0.0f ? -t : t;
}
__device__ __forceinline__ float normal_cdf(float x) { return 0.5f * (1.0f + erff(x * 0.7071067811865476f)); }

__device__ __forceinline__ float activate(float x, float slope) {
#if ACT == 1
    return x < 0.0f ? 0.0f : x;
#elif ACT == 2
    return x > 0.0f ? x : x * slope;
#elif ACT == 3
    return x > 0.0f ? x : __expf(x) - 1.0f;
#elif ACT == 4
    return __fdividef(x, 1.0f + __expf(-x));
#elif ACT == 5
    return x * normal_cdf(x);
#elif ACT == 6
    return hyperbolic_tangent(x);
#else
    return x;
#endif
}

struct Piece {
    uint4 v[PIECE];
};

// ``in_tile`` is the thread's first row in the tile, ``left`` the tile's rows that exist, ``base`` the byte at which the
// tile begins in the tensors, ``at`` the thread's first byte after that. A thread's rows are 16 apart.
__device__ __forceinline__ void load_piece(Piece& piece, const Arguments& a, int in_tile, int left, long long base,
                                           u32 at) {
    const uint4 zero = make_uint4(0, 0, 0, 0);
    if (WITHOUT & 2) left = 0;
    const char* const x = a.x + base + at;
#pragma unroll
    for (int i = 0; i < PIECE; ++i) {
        piece.v[i] = zero;
        if (in_tile + 16 * i < left) piece.v[i] = load_once(x + 32 * i * SUM);
    }
}

// The prologue on a piece, in place. ``column`` points to the thread's 8 columns of the first row of norm.
__device__ __forceinline__ void transform(Piece& piece, const Arguments& a, const float* column) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float4 mean = load_columns(column + 4 * half);
        const float4 scale = load_columns(column + 3 * SUM + 4 * half);
        const float4 shift = load_columns(column + 4 * SUM + 4 * half);
#pragma unroll
        for (int i = 0; i < PIECE; ++i) {
            u32& v0 = half ? piece.v[i].z : piece.v[i].x;
            u32& v1 = half ? piece.v[i].w : piece.v[i].y;
            v0 = pack(activate((low(v0) - mean.x) * scale.x + shift.x, a.slope),
                      activate((high(v0) - mean.y) * scale.y + shift.y, a.slope));
            v1 = pack(activate((low(v1) - mean.z) * scale.z + shift.z, a.slope),
                      activate((high(v1) - mean.w) * scale.w + shift.w, a.slope));
        }
    }
}

__device__ __forceinline__ void store_piece(const Piece& piece, u32 slot, int in_tile, u32 c8) {
#pragma unroll
    for (int i = 0; i < PIECE; ++i) {
        const u32 r = in_tile + 16 * i;  // r & 7 is the same for all of them
        const u32 to = slot + r * 128 + ((c8 ^ (r & 7)) << 4);
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(piece.v[i].x), "r"(piece.v[i].y),
                     "r"(piece.v[i].z), "r"(piece.v[i].w)
                     : "memory");
    }
}

// Part ``kc`` of KC of the rows of a tile of a tensor of ``width`` columns, into L2.
__device__ __forceinline__ void prefetch_rows(const Arguments& a, const char* tensor, int tile, int kc, int width) {
    if (!tensor) return;
    const long long begin = tile * 128ll + 128 * kc / KC, stop = tile * 128ll + 128 * (kc + 1) / KC;
    const long long end = stop < a.rows ? stop : a.rows;
    if (begin < end) prefetch_l2(tensor + begin * width * 2, (u32)(end - begin) * width * 2);
}

__device__ __forceinline__ void produce(const Arguments& a, u32 slots, u32 full, u32 empty, int first, int step) {
    constexpr int PIECES = 8 / PIECE;  // of a thread's 8 vectors of a chunk
    constexpr u32 DOWN = PIECE * 16 * SUM * 2;  // bytes from a piece to the next one
    const u32 thread = threadIdx.x - CONSUMERS, c8 = thread & 7;
    const int r = thread >> 3, rank = cluster_rank();
    const u32 thread_at = r * SUM * 2 + c8 * 16;
    Ring ring = {0, 0};
    Piece pieces[2];
    if (first - rank >= a.tiles) return;
    long long base = (long long)first * (128 * SUM * 2);
    int left = a.rows - first * 128;
#pragma unroll
    for (int i = 0; i < 2; ++i) load_piece(pieces[i], a, r + 16 * PIECE * i, left, base, thread_at + i * DOWN);
    for (int tile = first; tile - rank < a.tiles; tile += step) {
#pragma unroll 1
        for (int kc = 0; kc < KC; ++kc) {
            const bool last = kc + 1 == KC;
            const u32 at = thread_at + kc * 128, next_at = last ? thread_at : at + 128;
            const long long next_base = last ? base + step * (128ll * SUM * 2) : base;
            const int next_left = last ? left - step * 128 : left;
            const u32 slot = slots + ring.index * BLOCK;
#ifndef NO_PREFETCH
            if (thread == 0 && blockIdx.y == 0) {
                prefetch_rows(a, a.x, tile + step, kc, SUM);
                prefetch_rows(a, a.residual, tile, kc, COLUMNS);
            }
#endif
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
                Piece& piece = pieces[i & 1];
                if (!(WITHOUT & 4)) transform(piece, a, a.norm + kc * 64 + c8 * 8);
                if (i == 0) barrier_wait(empty + ring.index * 8, ring.phase ^ 1);
                store_piece(piece, slot, r + 16 * PIECE * i, c8);
                if (i + 2 < PIECES) {
                    load_piece(piece, a, r + 16 * PIECE * (i + 2), left, base, at + (i + 2) * DOWN);
                } else {
                    constexpr int BACK = PIECES - 2;
                    load_piece(piece, a, r + 16 * PIECE * (i - BACK), next_left, next_base, next_at + (i - BACK) * DOWN);
                }
            }
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // before the tensor cores read it
            __syncwarp();
            if ((threadIdx.x & 31) == 0) barrier_arrive(full + ring.index * 8);
            ring.advance<SLOTS>(1);
            base = next_base;
            left = next_left;
        }
    }
}
