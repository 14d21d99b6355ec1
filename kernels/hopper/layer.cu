// One layer of a residual block on Hopper (sm_90a), forward or backward, as one persistent kernel.
//
//   out[rows, COLUMNS] = epilogue(prologue(inputs[rows, SUM]) @ packed weight)
//
// MODE 0, forward:  prologue  h = activation((x - mean) * scale + shift), rounded to bf16
//                   epilogue  y = product + bias + residual; mean and centred second moment of y's columns (as rounded)
// MODE 1, backward: prologue  grad_y = scale * g - b - (y - mean) * c + skip_grad, rounded to bf16 and stored
//                   epilogue  d = product * activation'((x - mean) * scale + shift); column sums of d and of d * xhat
//
// Compile-time numbers: MODE, ACT (order of ACTIVATIONS in build.py), KC = SUM / 64, CL = CTAs of
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
#if KC * PANELS > 6
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
#ifndef EARLY_EXTRA  // the epilogue reads one group of columns ahead; in the backward there are no registers for it
#define EARLY_EXTRA (MODE == 0)
#endif
// 96 registers a thread at the start; 512 * 104 + 128 * 64 = 640 * 96.
#ifdef MOVE_REGISTERS
#define CONSUMER_REGISTERS set_registers_up<104>()
#define PRODUCER_REGISTERS set_registers_down<64>()
#else
#define CONSUMER_REGISTERS
#define PRODUCER_REGISTERS
#endif
#ifndef PIECE  // 16-byte vectors a producer thread holds of each input (two pieces are in flight): 1, 2 or 4
#define PIECE (MODE == 0 ? 4 : 1)
#endif

// ---------------------------------------------------------------------------------------------------- PTX in functions

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}

__device__ __forceinline__ void barrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// Arrive on the barrier at the same place in another CTA of the cluster.
__device__ __forceinline__ void barrier_arrive_at(u32 bar, u32 cta) {
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(bar),
        "r"(cta)
        : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

__device__ __forceinline__ bool barrier_try(u32 bar, u32 parity) {
    u32 done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
    return done != 0;
}

__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
#ifdef HOPPER_CHECK  // turn a deadlock into an error
    for (u32 tries = 0; !barrier_try(bar, parity); ++tries)
        if (tries > (1u << 20)) __trap();
#else
    while (!barrier_try(bar, parity)) {
    }
#endif
}

// Copy bytes from global memory into this CTA's shared memory, or with CL > 1 to the same place in every CTA of the
// cluster, and count them on the barrier there.
__device__ __forceinline__ void bulk_copy(u32 to, const void* from, u32 bytes, u32 bar) {
#if CL == 1
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(bar)
                 : "memory");
#else
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(to),
        "l"(from), "r"(bytes), "r"(bar), "h"((unsigned short)((1 << CL) - 1))
        : "memory");
#endif
}

__device__ __forceinline__ void prefetch_l2(const void* from, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ u32 cluster_rank() {
#if CL == 1
    return 0;
#else
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#endif
}

__device__ __forceinline__ void cluster_barrier() {
#if CL == 1
    __syncthreads();
#else
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
#endif
}

__device__ __forceinline__ void pair_barrier(u32 pair) {
    asm volatile("bar.sync %0, 256;" ::"r"(pair + 1) : "memory");
}

// All warps of a warpgroup together.
template <int COUNT>
__device__ __forceinline__ void set_registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void set_registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// A pair hands the tensor cores to the other one. Without this order a pair would wait for phases of barriers that are
// more than one ahead, which parities cannot tell from those that are over.
__device__ __forceinline__ void turn_wait(u32 pair) { asm volatile("bar.sync %0, 512;" ::"r"(pair + 3) : "memory"); }
__device__ __forceinline__ void turn_give(u32 pair) { asm volatile("bar.arrive %0, 512;" ::"r"(pair + 3) : "memory"); }

// K-major, 128-byte swizzle: 8 rows of 128 bytes are 1024 bytes apart from the next 8.
#ifndef DESCRIPTOR_HIGH
#define DESCRIPTOR_HIGH ((1ull << 62) | (64ull << 32) | (1ull << 16))
#endif
__device__ __forceinline__ u64 descriptor(u32 address) { return DESCRIPTOR_HIGH | ((address & 0x3ffff) >> 4); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// acc[64 x 128] = a[64 x 16] @ b[128 x 16]^T (+ acc)
__device__ __forceinline__ void wgmma(float (&d)[64], u64 a, u64 b, u32 add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1, 0, 0;\n}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
          "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
          "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
          "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "l"(a), "l"(b), "r"(add)
        : "memory");
}

__device__ __forceinline__ uint4 load_once(const void* p) {  // read once: past L1
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

__device__ __forceinline__ float4 load_columns(const float* p) {  // per-column numbers: from L1
    float4 v;
    asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p));
    return v;
}

// The same for the epilogue, where loads must not be moved over stores: registers are short.
__device__ __forceinline__ uint4 load_here(const void* p) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}
__device__ __forceinline__ float4 load_columns_here(const float* p) {
    float4 v;
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}
__device__ __forceinline__ float2 load_pair_here(const float* p) {
    float2 v;
    asm volatile("ld.global.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void store_here(void* p, u32 x, u32 y, u32 z, u32 w) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
__device__ __forceinline__ u32 thread_index() {  // computed anew where it is asked for
    u32 v;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(v));
    return v;
}

__device__ __forceinline__ float low(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high(u32 v) { return __uint_as_float(v & 0xffff0000u); }
__device__ __forceinline__ u32 pack(float lo, float hi) {
    u32 v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(hi), "f"(lo));
    return v;
}

// ---------------------------------------------------------------------------- activations, as in kernels/activations.py

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
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

__device__ __forceinline__ float activate_backward(float grad, float x, float slope) {
#if ACT == 1
    return x <= 0.0f ? 0.0f : grad;
#elif ACT == 2
    return x > 0.0f ? grad : grad * slope;
#elif ACT == 3
    return x > 0.0f ? grad : grad * __expf(x);
#elif ACT == 4
    float s = sigmoid(x);
    return grad * s * (1.0f + x * (1.0f - s));
#elif ACT == 5
    return grad * (normal_cdf(x) + x * 0.3989422804014327f * __expf(-0.5f * x * x));
#elif ACT == 6
    float t = hyperbolic_tangent(x);
    return grad * (1.0f - t * t);
#else
    return grad;
#endif
}

// -------------------------------------------------------------------------------------------------------- the arguments

struct Arguments {
    const char* input;      // [rows, SUM] bf16: x | g
    const char* raw;        // [rows, SUM] bf16: unused | y, or null: g is the gradient of y already
    const char* skip;       // [rows, SUM] bf16: unused | skip_grad or null
    const float* in_norm;   // norm [5, SUM] | norm_grad [4, SUM] or null with raw
    char* prologue;         // unused | grad_y [rows, SUM] or null
    const char* weight;     // packed
    const float* bias;      // [COLUMNS] or null | unused
    const char* extra;      // [rows, COLUMNS] bf16: residual or null | x
    const float* out_norm;  // unused | norm [5, COLUMNS]
    char* out;              // [rows, COLUMNS] bf16: y | d
    float* column0;         // [tiles, COLUMNS]: tile_mean or null | sums of d
    float* column1;         // [tiles, COLUMNS]: tile_m2 or null | sums of d * xhat
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

// ------------------------------------------------------------------------------------------------------------ producers

struct Piece {
    uint4 v[PIECE];
#if MODE == 1
    uint4 raw[PIECE], skip[PIECE];
#endif
};

// ``in_tile`` is the thread's first row in the tile, ``left`` the tile's rows that exist, ``base`` the byte at which the
// tile begins in the tensors, ``at`` the thread's first byte after that. A thread's rows are 16 apart.
__device__ __forceinline__ void load_piece(Piece& piece, const Arguments& a, int in_tile, int left, long long base,
                                           u32 at) {
    const uint4 zero = make_uint4(0, 0, 0, 0);
    if (WITHOUT & 2) left = 0;
    const char* const input = a.input + base + at;
#pragma unroll
    for (int i = 0; i < PIECE; ++i) {
        piece.v[i] = zero;
        if (in_tile + 16 * i < left) piece.v[i] = load_once(input + 32 * i * SUM);
    }
#if MODE == 1
    const char* const raw = a.raw + base + at;
#pragma unroll
    for (int i = 0; i < PIECE; ++i) {
        piece.raw[i] = zero;
        if (in_tile + 16 * i < left && a.raw) piece.raw[i] = load_once(raw + 32 * i * SUM);
    }
    const char* const skip = a.skip + base + at;
#pragma unroll
    for (int i = 0; i < PIECE; ++i) {
        piece.skip[i] = zero;
        if (in_tile + 16 * i < left && a.skip) piece.skip[i] = load_once(skip + 32 * i * SUM);
    }
#endif
}

// The prologue on a piece, in place. ``column`` points to the thread's 8 columns of the first row of in_norm.
__device__ __forceinline__ void transform(Piece& piece, const Arguments& a, const float* column) {
#if MODE == 1
    if (!a.raw) return;
#endif
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float4 mean = load_columns(column + 4 * half);
#if MODE == 0
        const float4 scale = load_columns(column + 3 * SUM + 4 * half);
        const float4 shift = load_columns(column + 4 * SUM + 4 * half);
#else
        const float4 scale = load_columns(column + SUM + 4 * half);
        const float4 b = load_columns(column + 2 * SUM + 4 * half);
        const float4 c = load_columns(column + 3 * SUM + 4 * half);
#endif
#pragma unroll
        for (int i = 0; i < PIECE; ++i) {
            u32& v0 = half ? piece.v[i].z : piece.v[i].x;
            u32& v1 = half ? piece.v[i].w : piece.v[i].y;
#if MODE == 0
            v0 = pack(activate((low(v0) - mean.x) * scale.x + shift.x, a.slope),
                      activate((high(v0) - mean.y) * scale.y + shift.y, a.slope));
            v1 = pack(activate((low(v1) - mean.z) * scale.z + shift.z, a.slope),
                      activate((high(v1) - mean.w) * scale.w + shift.w, a.slope));
#else
            const u32 y0 = half ? piece.raw[i].z : piece.raw[i].x, y1 = half ? piece.raw[i].w : piece.raw[i].y;
            const u32 s0 = half ? piece.skip[i].z : piece.skip[i].x, s1 = half ? piece.skip[i].w : piece.skip[i].y;
            v0 = pack(scale.x * low(v0) - b.x - (low(y0) - mean.x) * c.x + low(s0),
                      scale.y * high(v0) - b.y - (high(y0) - mean.y) * c.y + high(s0));
            v1 = pack(scale.z * low(v1) - b.z - (low(y1) - mean.z) * c.z + low(s1),
                      scale.w * high(v1) - b.w - (high(y1) - mean.w) * c.w + high(s1));
#endif
        }
    }
}

// To the slot, and in MODE 1 to grad_y.
__device__ __forceinline__ void store_piece(const Piece& piece, const Arguments& a, u32 slot, int in_tile, u32 c8,
                                            int left, long long base, u32 at) {
#pragma unroll
    for (int i = 0; i < PIECE; ++i) {
        const u32 r = in_tile + 16 * i;  // r & 7 is the same for all of them
        const u32 to = slot + r * 128 + ((c8 ^ (r & 7)) << 4);
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(piece.v[i].x), "r"(piece.v[i].y),
                     "r"(piece.v[i].z), "r"(piece.v[i].w)
                     : "memory");
    }
#if MODE == 1
    if (!a.prologue || blockIdx.y > 0) return;
    char* const to = a.prologue + base + at;
#pragma unroll
    for (int i = 0; i < PIECE; ++i)
        if (in_tile + 16 * i < left)
            store_here(to + 32 * i * SUM, piece.v[i].x, piece.v[i].y, piece.v[i].z, piece.v[i].w);
#endif
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
                prefetch_rows(a, a.input, tile + step, kc, SUM);
#if MODE == 1
                prefetch_rows(a, a.raw, tile + step, kc, SUM);
                prefetch_rows(a, a.skip, tile + step, kc, SUM);
#endif
                prefetch_rows(a, a.extra, tile, kc, COLUMNS);
            }
#endif
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
                Piece& piece = pieces[i & 1];
                if (!(WITHOUT & 4)) transform(piece, a, a.in_norm + kc * 64 + c8 * 8);
                if (i == 0) barrier_wait(empty + ring.index * 8, ring.phase ^ 1);
                store_piece(piece, a, slot, r + 16 * PIECE * i, c8, left, base, at + i * DOWN);
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

// ------------------------------------------------------------------------------------------------------------ consumers

// One level of the butterfly over the 8 rows of lanes: of ``2 * HALF`` columns, whose two numbers each are at
// acc[at(i)] and acc[at(i) + 8], a lane keeps the half that its bit says and merges the partner's numbers into them.
// Column i of 32 has its place at 16 * (i / 8) + i % 8.
__device__ __forceinline__ constexpr int place(int i) { return 16 * (i / 8) + i % 8; }

// FIRST .. LAST of the columns that are left.
template <int HALF, int FIRST, int LAST>
__device__ __forceinline__ void fold(float (&acc)[64], u32 lane, u32 bit, float& count) {
    const bool upper = lane & bit;
    const float other = __shfl_xor_sync(0xffffffffu, count, bit);
    const float total = count + other;
#if MODE == 0
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    const float weight = other * inverse, product = count * weight;
#endif
    count = total;
#pragma unroll
    for (int i = FIRST; i < LAST; ++i) {
        const int from = place(i), to = place(i + HALF);
        float mine0 = upper ? acc[to] : acc[from], mine1 = upper ? acc[to + 8] : acc[from + 8];
        const float send0 = upper ? acc[from] : acc[to], send1 = upper ? acc[from + 8] : acc[to + 8];
        const float got0 = __shfl_xor_sync(0xffffffffu, send0, bit), got1 = __shfl_xor_sync(0xffffffffu, send1, bit);
#if MODE == 0  // means and centred second moments: Chan, Golub and LeVeque's rule
        const float delta = got0 - mine0;
        acc[from] = mine0 + delta * weight;
        acc[from + 8] = (mine1 + got1) + delta * product * delta;
#else
        acc[from] = mine0 + got0;
        acc[from + 8] = mine1 + got1;
#endif
    }
}

__device__ __forceinline__ void epilogue(float (&acc)[64], const Arguments& a, float* scratch, int tile, int panel) {
    const u32 thread = thread_index(), lane = thread & 31, warp = (thread >> 5) & 7, pair = thread >> 8, q = lane & 3;
    const int row = tile * 128 + warp * 16 + (lane >> 2);
    const bool valid0 = row < a.rows, valid1 = row + 8 < a.rows;
#if MODE == 0
    const float both = valid1 ? 0.5f : 0.0f;
#endif
    const int column = panel * 128 + q * 8;
    const long long at = ((long long)row * COLUMNS + column) * 2;
    const char* const extra = a.extra + at;
    char* const out = a.out + at;
#if EARLY_EXTRA  // what the epilogue reads, one group of columns ahead
    uint4 n0 = make_uint4(0, 0, 0, 0), n1 = n0;
    if (a.extra && valid0) n0 = load_here(extra);
    if (a.extra && valid1) n1 = load_here(extra + 8 * COLUMNS * 2);
#endif
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        const int group = step == 1 ? 2 : step == 2 ? 1 : step;  // 0, 2, 1, 3
#if EARLY_EXTRA
        const uint4 e0 = n0, e1 = n1;
        if (step < 3) {
            const int next = step == 0 ? 2 : step == 1 ? 1 : 3;
            if (a.extra && valid0) n0 = load_here(extra + 64 * next);
            if (a.extra && valid1) n1 = load_here(extra + 64 * next + 8 * COLUMNS * 2);
        }
#else
        uint4 e0 = make_uint4(0, 0, 0, 0), e1 = e0;
        if (a.extra && valid0) e0 = load_here(extra + 64 * group);
        if (a.extra && valid1) e1 = load_here(extra + 64 * group + 8 * COLUMNS * 2);
#endif
        u32 w0[4] = {e0.x, e0.y, e0.z, e0.w}, w1[4] = {e1.x, e1.y, e1.z, e1.w};
        float(&s)[64] = acc;
        const int base = 16 * group;
        float t0[8], t1[8];  // what takes the accumulators' places
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            __syncwarp();  // keeps the second half's loads behind the first half: registers are short
#if MODE == 0
            float4 bias = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (a.bias) bias = load_columns_here(a.bias + column + 32 * group + 4 * half);
            const float b[4] = {bias.x, bias.y, bias.z, bias.w};
#endif
#pragma unroll
            for (int jj = 0; jj < 2; ++jj) {
#if MODE == 1
                const float* const norm = a.out_norm + column + 32 * group + 4 * half + 2 * jj;
                const float2 mean = load_pair_here(norm), scale = load_pair_here(norm + 3 * COLUMNS);
                const float2 shift = load_pair_here(norm + 4 * COLUMNS);
                __syncwarp();
#endif
                const int j = 2 * half + jj;  // columns 2 j, 2 j + 1 of the 8
                const u32 in0 = w0[j], in1 = w1[j];
#if MODE == 0
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
#else
                const float x00 = low(in0) - mean.x, x01 = high(in0) - mean.y;
                const float x10 = low(in1) - mean.x, x11 = high(in1) - mean.y;
                u32 d0 = pack(activate_backward(s[base + 4 * j], x00 * scale.x + shift.x, a.slope),
                              activate_backward(s[base + 4 * j + 1], x01 * scale.y + shift.y, a.slope));
                u32 d1 = pack(activate_backward(s[base + 4 * j + 2], x10 * scale.x + shift.x, a.slope),
                              activate_backward(s[base + 4 * j + 3], x11 * scale.y + shift.y, a.slope));
                if (!valid0) d0 = 0;
                if (!valid1) d1 = 0;
                w0[j] = d0;
                w1[j] = d1;
                t0[2 * j] = low(d0) + low(d1);
                t0[2 * j + 1] = high(d0) + high(d1);
                t1[2 * j] = low(d0) * x00 + low(d1) * x10;
                t1[2 * j + 1] = high(d0) * x01 + high(d1) * x11;
#endif
            }
        }
        if (valid0) store_here(out + 64 * group, w0[0], w0[1], w0[2], w0[3]);
        if (valid1) store_here(out + 64 * group + 8 * COLUMNS * 2, w1[0], w1[1], w1[2], w1[3]);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            acc[base + i] = t0[i];
            acc[base + 8 + i] = t1[i];
        }
#if MODE == 1
        if (step == 1) {  // groups 0 and 2 are done: this frees registers
            float unused = 0.0f;
            fold<16, 0, 8>(acc, lane, 16, unused);
        }
#endif
    }
    if (!a.column0) return;

    float count = (valid0 ? 1.0f : 0.0f) + (valid1 ? 1.0f : 0.0f);
#if MODE == 0
    fold<16, 0, 16>(acc, lane, 16, count);
#else
    fold<16, 8, 16>(acc, lane, 16, count);
#endif
    fold<8, 0, 8>(acc, lane, 8, count);
    fold<4, 0, 4>(acc, lane, 4, count);
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
#if MODE == 0
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
#else
#pragma unroll
        for (int w = 1; w < 8; ++w) {
            n0 += mine[w * 128 + column];
            n1 += mine[1024 + w * 128 + column];
        }
        n1 *= a.out_norm[COLUMNS + panel * 128 + column];  // rstd
#endif
        a.column0[to] = n0;
        a.column1[to] = n1;
    }
}

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

#ifdef PROBE
// ------------------------------------------------------------------------- for tests: one block, one product, seen apart

// out[64, 128] fp32 = input[64, 64] @ (one packed block)^T in the order of the block's rows, with the upper half of the
// descriptors given; copied[CTA][BLOCK] is what lay in the stage.
extern "C" __global__ void __launch_bounds__(128, 1)
#if CL > 1
    __cluster_dims__(CL, 1, 1)
#endif
        probe(const char* input, const char* weight, float* out, char* copied, u64 high) {
    extern __shared__ __align__(1024) char memory[];
    const u32 slot = shared_address(memory), stage = slot + BLOCK, bar = stage + BLOCK;
    const u32 t = threadIdx.x, lane = t & 31, warp = t >> 5;
    if (t == 0) {
        barrier_init(bar, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    cluster_barrier();
    if (t == 0) {
        Arguments a;
        a.weight = weight;
        fill(a, stage, bar, 0, 0);
    }
    for (u32 i = t; i < 64 * 8; i += 128) {
        const u32 r = i >> 3, c = i & 7;
        *(uint4*)(memory + r * 128 + ((c ^ (r & 7)) << 4)) = *(const uint4*)(input + i * 16);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    for (u32 tries = 0; !barrier_try(bar, 0); ++tries)
        if (tries > (1u << 20)) __trap();
    float acc[64];
    const u64 da = high | ((slot & 0x3ffff) >> 4), db = high | ((stage & 0x3ffff) >> 4);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma(acc, da + 2 * k, db + 2 * k, k > 0);
    wgmma_commit();
    wgmma_wait<0>();
    for (u32 i = t; i < BLOCK / 16; i += 128)
        *(uint4*)(copied + blockIdx.x * BLOCK + i * 16) = *(const uint4*)(memory + BLOCK + i * 16);
    if (blockIdx.x + 1 == gridDim.x) {
        const u32 row = warp * 16 + (lane >> 2);
#pragma unroll
        for (int i = 0; i < 64; ++i) out[(row + (i & 2) * 4) * 128 + (i >> 2) * 8 + (lane & 3) * 2 + (i & 1)] = acc[i];
    }
    cluster_barrier();
}
#endif

// ----------------------------------------------------------------------------------------------------------- the kernel

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
        CONSUMER_REGISTERS;
        consume(a, slots, slot_full, slot_empty, stages, stage_full, stage_empty, scratch);
    } else {
        PRODUCER_REGISTERS;
        produce(a, slots, slot_full, slot_empty, first, step);
    }
    __syncwarp();
    cluster_barrier();  // no CTA leaves while the other may write into it or arrive on its barriers
}
