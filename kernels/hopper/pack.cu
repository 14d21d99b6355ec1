// Packs weights for layer.cu: blocks of 128 columns of the result x 64 of the sum, K-major with the 128-byte swizzle, each
// 16384 bytes in one piece and in the order in which they are used (panel after panel, along the sum within it).
//
// Position 8 j + 2 q + e of every 32 rows of a block holds column 8 q + 2 j + e: see layer.cu.

typedef unsigned int u32;

__device__ __forceinline__ u32 pack(float lo, float hi) {
    u32 v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(hi), "f"(lo));
    return v;
}

// One thread a piece of 16 bytes: 8 along the sum. gridDim.y weights, one after the other.
extern "C" __global__ void pack_weight(const char* weight, char* packed, int columns, int sum, int is_fp32) {
    const int pieces = columns * sum / 8;
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= pieces) return;
    const int block = i >> 10, within = i & 1023;
    const int r = within >> 3, c = within & 7;
    const int panel = block / (sum / 64), kc = block % (sum / 64);
    const int column = panel * 128 + (r & ~31) + 8 * ((r >> 1) & 3) + 2 * ((r >> 3) & 3) + (r & 1);
    const long long first = (long long)blockIdx.y * columns * sum;
    const long long at = first + (long long)column * sum + kc * 64 + c * 8;
    float v[8];
    for (int n = 0; n < 8; ++n)
        v[n] = is_fp32 ? ((const float*)weight)[at + n] : __uint_as_float((u32)((const unsigned short*)weight)[at + n] << 16);
    *(uint4*)(packed + first * 2 + block * 16384ll + r * 128 + ((c ^ (r & 7)) << 4)) =
        make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
}
