// The GEMM of conv2d_gemm.cuh in f32 by plain multiply-adds: the twin that the bf16 kernels are held against, for any number of
// channels. 64 threads hold 8 x 8 (or 8 x 4) results each; k goes through shared memory sixteen at a time, k-major.
#pragma once
#include "conv2d_gemm.cuh"

constexpr int F32_BM = 64, F32_BK = 16, F32_THREADS = 64;

// Thread (ty, tx) holds rows 8 ty .. and columns 4 tx .. of each half of 32.
template <int BN> struct FmaTile {
    static constexpr int HALVES = BN / 32;
    float acc[8][4 * HALVES] = {};

    DEV int row() const { return threadIdx.x / 8 * 8; }
    DEV int column(int j) const { return j / 4 * 32 + threadIdx.x % 8 * 4; }  // of the quad that holds j

    DEV void multiply(const float* a, const float* b) {
        for (int k = 0; k < F32_BK; k++) {
            float x[8], y[4 * HALVES];
#pragma unroll
            for (int q = 0; q < 2; q++) {
                Vec<float, 4> v = *reinterpret_cast<const Vec<float, 4>*>(a + k * F32_BM + row() + 4 * q);
#pragma unroll
                for (int e = 0; e < 4; e++) x[4 * q + e] = v[e];
            }
#pragma unroll
            for (int q = 0; q < HALVES; q++) {
                Vec<float, 4> v = *reinterpret_cast<const Vec<float, 4>*>(b + k * BN + column(4 * q));
#pragma unroll
                for (int e = 0; e < 4; e++) y[4 * q + e] = v[e];
            }
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int j = 0; j < 4 * HALVES; j++) acc[i][j] = fmaf(x[i], y[j], acc[i][j]);
        }
    }
};

template <int BN, bool TRANSPOSED> DEV void conv_gemm_f32(const ConvGemm& p) {
    constexpr int STAGE = F32_BK * (F32_BM + BN), STAGED = TRANSPOSED ? 0 : F32_BM * BN;
    SMEM(float, shared, [STAGE > STAGED ? STAGE : STAGED]);
    float *a = shared, *b = shared + F32_BK * F32_BM;
    int phase = blockIdx.z, first = p.first_tap[phase], last = p.first_tap[phase + 1];
    int n0 = int(blockIdx.x % p.tiles_n) * BN, m0 = int(blockIdx.x / p.tiles_n) * F32_BM, id = threadIdx.x;
    int total = (last - first) * (p.a_channels[0] + p.a_channels[1]);
    GridRow mine(p, m0 + id);
    FmaTile<BN> tile;
    for (int k0 = 0; k0 < total; k0 += F32_BK) {
        for (int k = 0; k < F32_BK; k++) {
            a[k * F32_BM + id] = gathered<float>(p, mine, k0 + k, first, last);
            if (id < BN) b[k * BN + id] = weight<float, TRANSPOSED>(p, n0 + id, k0 + k, first, last);
        }
        __syncthreads();
        tile.multiply(a, b);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        Target to(p, m0 + tile.row() + i, phase);
#pragma unroll
        for (int q = 0; q < FmaTile<BN>::HALVES; q++) {
            float v[4] = {tile.acc[i][4 * q], tile.acc[i][4 * q + 1], tile.acc[i][4 * q + 2], tile.acc[i][4 * q + 3]};
            Quad at(p, to, n0 + tile.column(4 * q));
            at.add<float>(p, v);
            at.write<float>(p, v);
            if (!TRANSPOSED && p.sums) {
                Vec<float, 4> quad;
                for (int e = 0; e < 4; e++) quad[e] = v[e];
                *reinterpret_cast<Vec<float, 4>*>(shared + staged(tile.row() + i, tile.column(4 * q), BN)) = quad;
            }
        }
    }
    if (TRANSPOSED || !p.sums) return;
    __syncthreads();
    int column = id % BN;
    for (int m = id / BN * PART_ROWS; m < F32_BM; m += F32_THREADS / BN * PART_ROWS) {
        part_sums(p, phase, m0 + m, n0 + column, [&](int i) { return shared[staged(m + i, column, BN)]; });
    }
}
