// Tiles in shared memory times tiles in shared memory, by mma.sync m16n8k16 (sm_80): the heart of every bf16 convolution.
//
// A stage holds 32 values of k: operand A as rows of m (64 bytes each) or, transposed, as 32 rows of BM values; B likewise.
// Warps share the tile as a WARPS_M x WARPS_N grid; a warp of 128 x 128 holds 64 x 64 results, and per 16 values of k
// eight ldmatrix.x4 feed 32 products.
#pragma once
#include "conv2d.cuh"
#include "ptx.cuh"

constexpr int BK = 32, STAGES = 4;

template <int M, int N, int WARPS_M, int WARPS_N> struct MmaTile {
    static constexpr int BM = M, BN = N, THREADS = 32 * WARPS_M * WARPS_N;
    static constexpr int WM = M / WARPS_M, WN = N / WARPS_N, FRAGS_M = WM / 16, FRAGS_N = WN / 8;
    static constexpr int COPIES_A = BM * BK / 8 / THREADS, COPIES_B = BN * BK / 8 / THREADS;  // 16-byte chunks per thread
    static constexpr int STAGE = (BM + BN) * BK;
    static_assert(FRAGS_N % 2 == 0 && COPIES_A * THREADS == BM * BK / 8 && COPIES_B * THREADS == BN * BK / 8);
    static_assert(size_t(BM) * BN * sizeof(float) <= STAGES * STAGE * sizeof(bf16));  // the epilogue reuses the stages

    float acc[FRAGS_M][FRAGS_N][4] = {};

    DEV int lane() const { return threadIdx.x % 32; }
    DEV int warp_m() const { return int(threadIdx.x) / 32 / WARPS_N * WM; }
    DEV int warp_n() const { return int(threadIdx.x) / 32 % WARPS_N * WN; }

    // Sixteen rows of A at m, sixteen values of k at 16 kk.
    template <bool TRANSPOSED> DEV void load_a(uint32_t (&a)[4], const bf16* sa, int m, int kk) const {
        int l = lane();
        if constexpr (TRANSPOSED) {
            ldmatrix_x4_trans(a, sa + swizzled<BM / 8>(kk * 16 + l / 16 * 8 + l % 8, m / 8 + l / 8 % 2));
        } else {
            ldmatrix_x4(a, sa + swizzled<BK / 8>(m + l % 16, kk * 2 + l / 16));
        }
    }
    // Sixteen columns of B at n: b[0], b[1] belong to the first eight.
    template <bool TRANSPOSED> DEV void load_b(uint32_t (&b)[4], const bf16* sb, int n, int kk) const {
        int l = lane();
        if constexpr (TRANSPOSED) {
            ldmatrix_x4_trans(b, sb + swizzled<BN / 8>(kk * 16 + l / 8 % 2 * 8 + l % 8, n / 8 + l / 16));
        } else {
            ldmatrix_x4(b, sb + swizzled<BK / 8>(n + l / 16 * 8 + l % 8, kk * 2 + l / 8 % 2));
        }
    }
    // acc += the products of k = 16 kk .. 16 kk + 16 of a stage; leaves A's fragments in `a` for whoever needs them too.
    template <bool TRANSPOSED_A, bool TRANSPOSED_B>
    DEV void multiply(uint32_t (&a)[FRAGS_M][4], const bf16* sa, const bf16* sb, int kk) {
        uint32_t b[FRAGS_N / 2][4];
#pragma unroll
        for (int i = 0; i < FRAGS_M; i++) load_a<TRANSPOSED_A>(a[i], sa, warp_m() + 16 * i, kk);
#pragma unroll
        for (int j = 0; j < FRAGS_N / 2; j++) load_b<TRANSPOSED_B>(b[j], sb, warp_n() + 16 * j, kk);
#pragma unroll
        for (int i = 0; i < FRAGS_M; i++)
#pragma unroll
            for (int j = 0; j < FRAGS_N; j++) mma_bf16_16816(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
    // f(m, n, results at (m, n) and (m, n + 1)) for all this thread holds.
    template <class F> DEV void each(F f) const {
        int g = lane() / 4, t = lane() % 4;
#pragma unroll
        for (int i = 0; i < FRAGS_M; i++)
#pragma unroll
            for (int j = 0; j < FRAGS_N; j++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    f(warp_m() + 16 * i + g + 8 * half, warp_n() + 8 * j + 2 * t, acc[i][j][2 * half], acc[i][j][2 * half + 1]);
    }
};
