// What the parts of the layer kernel share: its compile-time numbers, its arguments, a place in a ring. See layer.cu.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef CL
#define CL 2
#endif
#ifndef SPLIT
#define SPLIT 1
#endif
#define SUM (KC * 64)
#define COLUMNS (PANELS * SPLIT * 128)
#define BLOCK 16384  // bytes of an A slot and of a W stage
#define RESIDENT (KC * PANELS <= 8)
#if RESIDENT
#define STAGES (KC * PANELS)
#if KC * PANELS > 5
#define SLOTS 5
#else
#define SLOTS 8
#endif
#else
#define STAGES 5
#define AHEAD 3  // stages between a copy's issue and its use; the two before it may still be read
#define SLOTS 8
#endif
#define CONSUMERS 512
#define PRODUCERS 128
#define THREADS (CONSUMERS + PRODUCERS)
#ifndef WITHOUT  // for measurements, with wrong results: sum of 1 wgmma, 2 input loads, 4 prologue, 8 epilogue, 16 W copies
#define WITHOUT 0
#endif
#ifndef PIECE  // 16-byte vectors a producer thread holds of each input (two pieces are in flight): 1, 2 or 4
#define PIECE 4
#endif

struct Arguments {
    const char* x;         // [rows, SUM] bf16
    const float* norm;     // [5, SUM]
    const char* weight;    // packed
    const float* bias;     // [COLUMNS] or null
    const char* residual;  // [rows, COLUMNS] bf16 or null
    char* y;               // [rows, COLUMNS] bf16
    float* tile_mean;      // [tiles, COLUMNS] or null
    float* tile_m2;        // [tiles, COLUMNS] or null
    int rows;
    int tiles;
    float slope;
};

struct Ring {  // a place in a ring of barriers and the parity of its phase
    u32 index, phase;
    template <int SIZE>
    __device__ __forceinline__ void advance(u32 by) {
        index += by;
        if (index >= SIZE) {  // by <= SIZE
            index -= SIZE;
            phase ^= 1;
        }
    }
};
