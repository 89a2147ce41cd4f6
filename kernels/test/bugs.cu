// Kernels with one bug each, planted for the detectors: tests/suite/driver/bugs.rs and scripts/sanitize.sh must find every
// one. Never compiled for a GPU. Each but the last few computes out[i] from in[i] for one block of 128 threads.
#include "ptx.cuh"

#define BUG(name) extern "C" __global__ void __launch_bounds__(128) name(float* out, const float* in, int n)

// ---- accesses ----
BUG(bug_global_read_past_end) {
    if (in[threadIdx.x + (threadIdx.x == 127)] != 3.25f) out[threadIdx.x] = in[threadIdx.x];  // in[128], result unchanged
}
BUG(bug_global_write_past_end) { out[threadIdx.x + (threadIdx.x == 127)] = in[threadIdx.x]; }
BUG(bug_misaligned_vector) {
    if (threadIdx.x < 30) {
        float4 v = *reinterpret_cast<const float4*>(in + threadIdx.x * 4 + 1);
        out[threadIdx.x] = v.x + v.y + v.z + v.w;
    }
}
BUG(bug_shared_read_past_end) {
    SMEM(float, s, [128]);
    s[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = s[threadIdx.x] + (s[threadIdx.x + 1] == 12345.0f ? 1.0f : 0.0f);  // s[128], result unchanged
}
BUG(bug_dynamic_shared_past_end) {
    SMEM_DYN(smem);
    float* s = smem.take<float>(64);
    s[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = s[n - 1 - threadIdx.x];
}
BUG(bug_dynamic_shared_not_given) {
    SMEM_DYN(smem);
    float* s = smem.take<float>(1024);
    s[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = s[threadIdx.x];
}
BUG(bug_uninitialised_shared) {
    SMEM(float, s, [128]);
    if (threadIdx.x) s[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = s[threadIdx.x] * 0.0f + 1.0f;
}
BUG(bug_host_pointer) { out[threadIdx.x] = *reinterpret_cast<const float*>(uintptr_t(n)); }
BUG(bug_shift_too_far) { out[threadIdx.x] = in[threadIdx.x] + float(1 << (n - 96 + int(threadIdx.x % 8))); }  // n = 128

// ---- order ----
BUG(bug_missing_barrier) {
    SMEM(float, s, [128]);
    s[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = s[n - 1 - threadIdx.x];
}
// The second barrier of the loop is missing: a fast warp overwrites what a slow one still reads.
BUG(bug_missing_second_barrier) {
    SMEM(float, s, [128]);
    float sum = 0;
    for (int round = 0; round < 8; round++) {
        s[threadIdx.x] = in[threadIdx.x] * round;
        __syncthreads();
        sum += s[n - 1 - threadIdx.x];
    }
    out[threadIdx.x] = sum;
}
BUG(bug_missing_syncwarp) {
    SMEM(float, s, [128]);
    s[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = s[threadIdx.x ^ 1];
}
BUG(bug_race_between_blocks) { out[threadIdx.x % 8] += in[threadIdx.x]; }
BUG(bug_divergent_barrier) {
    SMEM(float, s, [128]);
    s[threadIdx.x] = in[threadIdx.x];
    if (threadIdx.x < 64) {
        __syncthreads();
        out[threadIdx.x] = s[n - 1 - threadIdx.x];
    } else {
        __syncthreads();
        out[threadIdx.x] = s[n - 1 - threadIdx.x] + 0.0f;
    }
}
BUG(bug_exit_before_barrier) {
    SMEM(float, s, [128]);
    if (threadIdx.x == 5) return;
    s[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = s[threadIdx.x];
}
BUG(bug_divergent_shuffle) {
    float v = in[threadIdx.x];
    if (threadIdx.x % 32 < 16) v += __shfl_xor_sync(FULL_MASK, v, 1);
    out[threadIdx.x] = v;
}
BUG(bug_shuffle_from_absent_lane) {
    float v = in[threadIdx.x];
    if (threadIdx.x % 32 < 16) v += __shfl_sync(0xffffu, v, 20);
    out[threadIdx.x] = v;
}

// ---- asynchronous copies: 4 rounds of 128 x 16 bytes through a ring of two stages ----
BUG(bug_cp_async_wait_too_weak) {
    SMEM(float4, ring, [2][32]);
    if (threadIdx.x >= 32) return;
    auto load = [&](int s) {
        cp_async16(&ring[s % 2][threadIdx.x], in + threadIdx.x * 4);
        cp_async_commit();
    };
    load(0);
    for (int s = 0; s < 4; s++) {
        if (s < 3) load(s + 1);
        cp_async_wait<2>();  // 1 is right: the group before the last must have landed
        __syncwarp();
        out[s * 32 + threadIdx.x] = ring[s % 2][31 - threadIdx.x].x;
        __syncwarp();
    }
    cp_async_wait<0>();
}
BUG(bug_cp_async_no_wait) {
    SMEM(float4, s, [32]);
    if (threadIdx.x >= 32) return;
    cp_async16(&s[threadIdx.x], in + threadIdx.x * 4);
    cp_async_commit();
    out[threadIdx.x] = in[threadIdx.x];
}

// ---- Hopper ----
extern "C" __global__ void __launch_bounds__(128) bug_wrong_swizzle(float* out, const __grid_constant__ TensorMap map) {
    SMEM_DYN(smem);
    bf16* tile = smem.take<bf16>(8 * 64, 1024);
    SMEM(uint64_t, bar, [1]);
    if (threadIdx.x == 0) {
        mbar_init(bar, 1);
        mbar_fence_init();
        mbar_arrive_expect_tx(bar, 1024);
        tma_load_2d(tile, &map, bar, 0, 0);
    }
    __syncthreads();
    mbar_wait(bar, 0);
    for (int i = threadIdx.x; i < 512; i += 128) {
        int row = i / 64, chunk = i % 64 / 8;
        out[i] = to_float(tile[row * 64 + (chunk ^ (row >> 1)) * 8 + i % 8]);  // the row's low 3 bits permute, not row / 2
    }
}
extern "C" __global__ void __launch_bounds__(128) bug_mbarrier_never_completes(float* out, const __grid_constant__ TensorMap map) {
    SMEM_DYN(smem);
    bf16* tile = smem.take<bf16>(8 * 64, 1024);
    SMEM(uint64_t, bar, [1]);
    if (threadIdx.x == 0) {
        mbar_init(bar, 1);
        mbar_fence_init();
        mbar_arrive_expect_tx(bar, 2048);  // the tile has 1024 bytes
        tma_load_2d(tile, &map, bar, 0, 0);
    }
    __syncthreads();
    mbar_wait(bar, 0);
    out[threadIdx.x] = to_float(tile[threadIdx.x]);
}
extern "C" __global__ void __launch_bounds__(128) bug_mbarrier_before_init(float* out, const __grid_constant__ TensorMap map) {
    SMEM_DYN(smem);
    bf16* tile = smem.take<bf16>(8 * 64, 1024);
    SMEM(uint64_t, bar, [1]);
    if (threadIdx.x == 0) mbar_init(bar, 1);
    mbar_wait(bar, 0);  // no barrier after the init
    out[threadIdx.x] = to_float(tile[threadIdx.x]);
}
// A ring of two stages whose consumers release a stage before they have read it.
extern "C" __global__ void __launch_bounds__(256) bug_stage_released_early(float* out, const __grid_constant__ TensorMap map) {
    SMEM_DYN(smem);
    bf16* tile = smem.take<bf16>(2 * 8 * 64, 1024);
    SMEM(uint64_t, bar, [4]);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            mbar_init(&bar[i], 1);
            mbar_init(&bar[2 + i], 128);
        }
        mbar_fence_init();
    }
    __syncthreads();
    if (threadIdx.x >= 128) {
        if (threadIdx.x == 128) {
            for (int s = 0; s < 6; s++) {
                if (s >= 2) mbar_wait(&bar[2 + s % 2], (s / 2 - 1) & 1);
                mbar_arrive_expect_tx(&bar[s % 2], 1024);
                tma_load_2d(tile + s % 2 * 512, &map, &bar[s % 2], 0, s * 8);
            }
        }
        return;
    }
    for (int s = 0; s < 6; s++) {
        mbar_wait(&bar[s % 2], s / 2 & 1);
        mbar_arrive(&bar[2 + s % 2]);
        __syncwarp();
        for (int i = threadIdx.x; i < 512; i += 128) out[s * 512 + i] = to_float(tile[s % 2 * 512 + i]);
    }
}

// ---- waste: right results, wrong cost ----
BUG(waste_strided) { out[threadIdx.x] = in[threadIdx.x * 8 % n]; }
BUG(waste_read_twice) {  // n is large: a second pass over it comes from memory again
    float sum = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int i = threadIdx.x; i < n; i += 128) sum += in[i];
    }
    out[threadIdx.x] = sum;
}
BUG(waste_scalar_stores) {
    for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = in[threadIdx.x * 4 + i];
}
BUG(waste_bank_conflicts) {
    SMEM(float, tile, [32][32]);
    int x = threadIdx.x % 32;
    for (int y = threadIdx.x / 32; y < 32; y += 4) tile[y][x] = in[y * 32 + x];
    __syncthreads();
    for (int y = threadIdx.x / 32; y < 32; y += 4) out[y * 32 + x] = tile[x][y];
}
BUG(waste_none) {
    SMEM(float, tile, [32][33]);
    int x = threadIdx.x % 32;
    for (int y = threadIdx.x / 32; y < 32; y += 4) tile[y][x] = in[y * 32 + x];
    __syncthreads();
    for (int y = threadIdx.x / 32; y < 32; y += 4) out[y * 32 + x] = tile[x][y];
}
