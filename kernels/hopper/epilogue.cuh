// The epilogue of a panel: bias, residual, rounding, and the columns' moments. See layer.cu.
#pragma once

#include "layout.cuh"
#include "ptx.cuh"

// One level of the butterfly over the 8 rows of lanes: of ``2 * HALF`` columns, whose two numbers each are at
// acc[at(i)] and acc[at(i) + 8], a lane keeps the half that its bit says and merges the partner's numbers into them.
// Column i of 32 has its place at 16 * (i / 8) + i % 8.
__device__ __forceinline__ constexpr int place(int i) { return 16 * (i / 8) + i % 8; }

template <int HALF>
__device__ __forceinline__ void fold(float (&acc)[64], u32 lane, u32 bit, float& count) {
    const bool upper = lane & bit;
    const float other = __shfl_xor_sync(0xffffffffu, count, bit);
    const float total = count + other;
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    const float weight = other * inverse, product = count * weight;
    count = total;
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
        const int from = place(i), to = place(i + HALF);
        float mine0 = upper ? acc[to] : acc[from], mine1 = upper ? acc[to + 8] : acc[from + 8];
        const float send0 = upper ? acc[from] : acc[to], send1 = upper ? acc[from + 8] : acc[to + 8];
        const float got0 = __shfl_xor_sync(0xffffffffu, send0, bit), got1 = __shfl_xor_sync(0xffffffffu, send1, bit);
        const float delta = got0 - mine0;  // of means and centred second moments: Chan, Golub and LeVeque's rule
        acc[from] = mine0 + delta * weight;
        acc[from + 8] = (mine1 + got1) + delta * product * delta;
    }
}

__device__ __forceinline__ void epilogue(float (&acc)[64], const Arguments& a, float* scratch, int tile, int panel) {
    const u32 thread = thread_index(), lane = thread & 31, warp = (thread >> 5) & 7, pair = thread >> 8, q = lane & 3;
    const int row = tile * 128 + warp * 16 + (lane >> 2);
    const bool valid0 = row < a.rows, valid1 = row + 8 < a.rows;
    const float both = valid1 ? 0.5f : 0.0f;
    const int column = panel * 128 + q * 8;
    const long long at = ((long long)row * COLUMNS + column) * 2;
    const char* const residual = a.residual + at;
    char* const y = a.y + at;
    uint4 n0 = make_uint4(0, 0, 0, 0), n1 = n0;  // of the residual, one group of columns ahead
    if (a.residual && valid0) n0 = load_here(residual);
    if (a.residual && valid1) n1 = load_here(residual + 8 * COLUMNS * 2);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        const int group = step == 1 ? 2 : step == 2 ? 1 : step;  // 0, 2, 1, 3
        const uint4 e0 = n0, e1 = n1;
        if (step < 3) {
            const int next = step == 0 ? 2 : step == 1 ? 1 : 3;
            if (a.residual && valid0) n0 = load_here(residual + 64 * next);
            if (a.residual && valid1) n1 = load_here(residual + 64 * next + 8 * COLUMNS * 2);
        }
        u32 w0[4] = {e0.x, e0.y, e0.z, e0.w}, w1[4] = {e1.x, e1.y, e1.z, e1.w};
        float(&s)[64] = acc;
        const int base = 16 * group;
        float t0[8], t1[8];  // what takes the accumulators' places
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            __syncwarp();  // keeps the second half's loads behind the first half: registers are short
            float4 bias = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (a.bias) bias = load_columns_here(a.bias + column + 32 * group + 4 * half);
            const float b[4] = {bias.x, bias.y, bias.z, bias.w};
#pragma unroll
            for (int jj = 0; jj < 2; ++jj) {
                const int j = 2 * half + jj;  // columns 2 j, 2 j + 1 of the 8
                const u32 in0 = w0[j], in1 = w1[j];
                u32 y0 = pack((s[base + 4 * j] + b[2 * jj]) + low(in0), (s[base + 4 * j + 1] + b[2 * jj + 1]) + high(in0));
                u32 y1 =
                    pack((s[base + 4 * j + 2] + b[2 * jj]) + low(in1), (s[base + 4 * j + 3] + b[2 * jj + 1]) + high(in1));
                w0[j] = y0;
                w1[j] = y1;
                if (!valid0) y0 = 0;
                if (!valid1) y1 = 0;
                const float d0 = low(y1) - low(y0), d1 = high(y1) - high(y0);
                t0[2 * j] = low(y0) + d0 * both;
                t0[2 * j + 1] = high(y0) + d1 * both;
                t1[2 * j] = d0 * both * d0;
                t1[2 * j + 1] = d1 * both * d1;
            }
        }
        if (valid0) store_here(y + 64 * group, w0[0], w0[1], w0[2], w0[3]);
        if (valid1) store_here(y + 64 * group + 8 * COLUMNS * 2, w1[0], w1[1], w1[2], w1[3]);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            acc[base + i] = t0[i];
            acc[base + 8 + i] = t1[i];
        }
    }
    if (!a.tile_mean) return;

    float count = (valid0 ? 1.0f : 0.0f) + (valid1 ? 1.0f : 0.0f);
    fold<16>(acc, lane, 16, count);
    fold<8>(acc, lane, 8, count);
    fold<4>(acc, lane, 4, count);
    // Bits 4 and 3 chose the group of 32 columns, bit 2 four of the 8 columns: 4 numbers of each kind are left.
    const u32 kept = ((lane >> 4) & 1) * 64 + ((lane >> 3) & 1) * 32 + q * 8 + ((lane >> 2) & 1) * 4;
    float* const mine = scratch + pair * 2048;
    pair_barrier(pair);  // the pair has read what it wrote last time
    *(float4*)(mine + warp * 128 + kept) = make_float4(acc[0], acc[1], acc[2], acc[3]);
    *(float4*)(mine + 1024 + warp * 128 + kept) = make_float4(acc[8], acc[9], acc[10], acc[11]);
    pair_barrier(pair);
    if (warp < 4 && tile < a.tiles) {
        const u32 column = warp * 32 + lane;
        const long long to = (long long)tile * COLUMNS + panel * 128 + column;
        float n0 = mine[column], n1 = mine[1024 + column];
        const int left = a.rows - tile * 128;
        float rows = left < 16 ? (float)left : 16.0f;
#pragma unroll
        for (int w = 1; w < 8; ++w) {
            const float more = left < 16 * w ? 0.0f : left < 16 * w + 16 ? (float)(left - 16 * w) : 16.0f;
            const float delta = mine[w * 128 + column] - n0, weight = __fdividef(more, rows + more);
            n0 += delta * weight;
            n1 += mine[1024 + w * 128 + column] + delta * (rows * weight) * delta;
            rows += more;
        }
        a.tile_mean[to] = n0;
        a.tile_m2[to] = n1;
    }
}
