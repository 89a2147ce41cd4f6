// One small kernel for each intrinsic and each function of ptx.cuh below sm_90, held against a plain loop by tests/suite/driver.
#include "ptx.cuh"

// out: (9, 32). Row by row: shuffles up, down, xor, indexed within 8 lanes; ballot; any; all; sum; maximum.
extern "C" __global__ void test_warp(int* out, const int* in) {
    int l = threadIdx.x, v = in[l];
    out[l] = __shfl_up_sync(FULL_MASK, v, 3);
    out[32 + l] = __shfl_down_sync(FULL_MASK, v, 5);
    out[64 + l] = __shfl_xor_sync(FULL_MASK, v, 9);
    out[96 + l] = __shfl_sync(FULL_MASK, v, 2, 8);
    out[128 + l] = int(__ballot_sync(FULL_MASK, v > 0));
    out[160 + l] = __any_sync(FULL_MASK, v == 7);
    out[192 + l] = __all_sync(FULL_MASK, v > -100);
    out[224 + l] = __reduce_add_sync(FULL_MASK, v);
    out[256 + l] = __reduce_max_sync(FULL_MASK, v);
}

// Sum of each block by shared memory and barriers, counts by integer atomics.   sums: (blocks), counts: (8)
extern "C" __global__ void __launch_bounds__(256) test_block(int* sums, unsigned* counts, const int* in, int n) {
    SMEM(int, part, [256]);
    int i = int(blockIdx.x * blockDim.x + threadIdx.x), v = i < n ? in[i] : 0;
    part[threadIdx.x] = v;
    if (i < n) atomicAdd(&counts[v & 7], 1u);
    for (int width = blockDim.x / 2; width > 0; width /= 2) {
        __syncthreads();
        if (threadIdx.x < unsigned(width)) part[threadIdx.x] += part[threadIdx.x + width];
    }
    int positive = __syncthreads_count(v > 0);
    if (threadIdx.x == 0) sums[blockIdx.x] = part[0] + 1000000 * positive;
}

// Copies 256 words of 16 bytes in a ring of three stages of 32, and zeros from word `valid` on.
extern "C" __global__ void __launch_bounds__(32) test_cp_async(uint4* out, const uint4* in, int valid) {
    SMEM(uint4, ring, [3][32]);
    auto load = [&](int s) {
        int i = s * 32 + threadIdx.x;
        cp_async16(&ring[s % 3][threadIdx.x], in + (i < valid ? i : 0), i < valid ? 16 : 0);
        cp_async_commit();
    };
    load(0);
    load(1);
    for (int s = 0; s < 8; s++) {
        if (s + 2 < 8) load(s + 2); else cp_async_commit();
        cp_async_wait<2>();
        __syncthreads();
        out[s * 32 + threadIdx.x] = ring[s % 3][31 - threadIdx.x];
        __syncthreads();
    }
    cp_async_wait<0>();
}

// Copies 4 and 8 bytes at a time.
extern "C" __global__ void __launch_bounds__(32) test_cp_async_small(uint32_t* out4, uint2* out8, const uint32_t* in4, const uint2* in8) {
    SMEM(uint32_t, a, [32]);
    SMEM(uint2, b, [32]);
    cp_async<4>(&a[threadIdx.x], in4 + threadIdx.x);
    cp_async<8>(&b[threadIdx.x], in8 + threadIdx.x, threadIdx.x < 16 ? 8 : 0);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    out4[threadIdx.x] = a[threadIdx.x ^ 1];
    out8[threadIdx.x] = b[threadIdx.x ^ 1];
}

// Registers of every lane after ldmatrix.   out: (3, 32, 4): x4, x4 transposed, x2 and x2 transposed; in: (32, 8) b16
extern "C" __global__ void __launch_bounds__(32) test_ldmatrix(uint32_t* out, const uint4* in) {
    SMEM(uint4, rows, [32]);
    int l = threadIdx.x;
    rows[l] = in[l];
    __syncwarp();
    uint32_t r[4], s[4], u[2], v[2];
    ldmatrix_x4(r, &rows[l]);
    ldmatrix_x4_trans(s, &rows[l]);
    ldmatrix_x2(u, &rows[l % 16]);
    ldmatrix_x2_trans(v, &rows[l % 16]);
    for (int i = 0; i < 4; i++) {
        out[l * 4 + i] = r[i];
        out[128 + l * 4 + i] = s[i];
        out[256 + l * 4 + i] = i < 2 ? u[i] : v[i - 2];
    }
}

// c (m, n) = a (m, k) b (n, k)^T, f32 out. One warp per 16 x 8 tile; operands straight from global memory.
template <class T, int K> DEV void tile_operands(uint32_t (&a)[4], uint32_t (&b)[2], const T* pa, const T* pb, int k) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    for (int i = 0; i < 4; i++) {
        int row = g + (i & 1) * 8;
        if constexpr (K == 16) {
            a[i] = *reinterpret_cast<const uint32_t*>(pa + row * k + 2 * t + (i >> 1) * 8);
        } else {
            a[i] = to_tf32(pa[row * k + t + (i >> 1) * 4]);
        }
    }
    for (int i = 0; i < 2; i++) {
        if constexpr (K == 16) {
            b[i] = *reinterpret_cast<const uint32_t*>(pb + g * k + 2 * t + i * 8);
        } else {
            b[i] = to_tf32(pb[g * k + t + i * 4]);
        }
    }
}
template <class T, int K> DEV void tile_product(float* c, const T* a, const T* b, int n, int k) {
    const T *pa = a + blockIdx.y * 16 * k, *pb = b + blockIdx.x * 8 * k;
    float d[4] = {};
    for (int i = 0; i < k; i += K) {
        uint32_t ra[4], rb[2];
        tile_operands<T, K>(ra, rb, pa + i, pb + i, k);
        if constexpr (K == 16) {
            mma_bf16_16816(d, ra, rb[0], rb[1]);
        } else {
            mma_tf32_1688(d, ra, rb[0], rb[1]);
        }
    }
    int row = blockIdx.y * 16 + threadIdx.x / 4, column = blockIdx.x * 8 + threadIdx.x % 4 * 2;
    for (int i = 0; i < 4; i++) c[(row + i / 2 * 8) * n + column + i % 2] = d[i];
}
extern "C" __global__ void __launch_bounds__(32) test_mma_bf16(float* c, const bf16* a, const bf16* b, int n, int k) {
    tile_product<bf16, 16>(c, a, b, n, k);
}
extern "C" __global__ void __launch_bounds__(32) test_mma_tf32(float* c, const float* a, const float* b, int n, int k) {
    tile_product<float, 8>(c, a, b, n, k);
}

// Two warps produce, two consume, through named barriers: out[i] = 2 in[i] for 8 rounds of 64.
extern "C" __global__ void __launch_bounds__(128) test_named_barriers(int* out, const int* in) {
    SMEM(int, box, [64]);
    int l = threadIdx.x % 64;
    bool producer = threadIdx.x < 64;
    for (int round = 0; round < 8; round++) {
        if (producer) {
            if (round) named_barrier_sync(2, 128);  // emptied
            box[l] = 2 * in[round * 64 + l];
            named_barrier_arrive(1, 128);           // filled
        } else {
            named_barrier_sync(1, 128);
            out[round * 64 + l] = box[63 - l];
            if (round < 7) named_barrier_arrive(2, 128);
        }
    }
}
