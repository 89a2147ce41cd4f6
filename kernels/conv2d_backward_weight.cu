// Gradients of a convolution's parameters: conv2d_weight.cuh by tensor cores (bf16 in, f32 out) and by plain f32.
//   dy: (n, oh, ow, oc), x: (n, h, w, ca) and (n, h, w, cb), dw: (oc, taps, ca + cb) f32, bias and time shift from the row sums.
// dy and x come from device memory once and again from L2, by each tile of columns and of o; so do the partial sums of the splits.
#include "conv2d_gemm_f32.cuh"
#include "conv2d_mma.cuh"
#include "conv2d_weight.cuh"

// Copies runs of 16 pixels to shared memory, pixels as rows; ANY_Y, ANY_X: that operand element by element.
template <class Tile, bool ANY_Y, bool ANY_X> struct WeightLoader {
    static constexpr int CHUNKS = Tile::BM / 8;
    static_assert(Tile::BM == Tile::BN && Tile::THREADS == 16 * CHUNKS, "one chunk of each operand per thread and run");

    const ConvWeight& p;
    const Columns& cols;
    Split split;
    int m, row, chunk;

    DEV WeightLoader(const ConvWeight& p, const Columns& cols, int m0)
        : p(p), cols(cols), split(p), row(threadIdx.x / CHUNKS), chunk(threadIdx.x % CHUNKS) {
        m = m0 + chunk * 8;
    }
    DEV void load(int run, int kk, bf16* sa, bf16* sb) const {
        GridPixel at(p, split.first, split.last, run, row);
        int to = swizzled<CHUNKS>(16 * kk + row, chunk), y = at.y(p, p.taps[cols.tap]);
        bf16 v[8];
        if constexpr (ANY_Y) {
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] = gradient_at<bf16>(p, y, m + e);
            store_chunk(sa + to, v);
        } else {
            const bf16* dy = static_cast<const bf16*>(p.dy);
            bool ok = y >= 0 && m < p.oc;
            cp_async16(sa + to, ok ? dy + int64_t(y) * p.oc + m : dy, ok ? 16 : 0);
        }
        if constexpr (ANY_X) {
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] = input_at<bf16>(p, at, cols, chunk * 8 + e);
            store_chunk(sb + to, v);
        } else {
            const bf16* x = static_cast<const bf16*>(p.x[cols.s]);
            int pixel = chunk * 8 < cols.count ? at.x(p, p.taps[cols.tap]) : -1;
            cp_async16(sb + to, pixel < 0 ? x : x + int64_t(pixel) * p.x_channels[cols.s] + cols.c0 + chunk * 8, pixel < 0 ? 0 : 16);
        }
    }
};

// Row sums of dy by products with a matrix of ones: each of the warps that share rows takes one fragment of them.
template <class Tile> struct RowSums {
    static constexpr uint32_t ONES = 0x3f803f80;
    static_assert(Tile::FRAGS_M == Tile::BN / Tile::WN, "as many fragments of rows as warps to sum them");
    float acc[4] = {};

    DEV void add(const ConvWeight& p, const Split& split, const Tile& tile, const uint32_t (&a)[Tile::FRAGS_M][4], int run, int m0, int slot) {
        int mine = tile.warp_n() / Tile::WN;
#pragma unroll
        for (int i = 0; i < Tile::FRAGS_M; i++)
            if (i == mine) mma_bf16_16816(acc, a[i], ONES, ONES);
        if (run >= split.runs || !ends_segment(p, run)) return;
        int o = m0 + tile.warp_m() + 16 * mine + tile.lane() / 4;
        if (tile.lane() % 4 == 0) {
            if (o < p.oc) *sums_at(p, split, run, slot, o) = acc[0];
            if (o + 8 < p.oc) *sums_at(p, split, run, slot, o + 8) = acc[2];
        }
        acc[0] = acc[1] = acc[2] = acc[3] = 0.0f;
    }
};

template <class Tile, bool ANY_Y, bool ANY_X> DEV void conv_weight_bf16(const ConvWeight& p) {
    SMEM_DYN(shared);
    bf16* stages = shared.take<bf16>(STAGES * Tile::STAGE);
    int m0 = int(blockIdx.x / p.tiles_n) * Tile::BM;
    Columns cols(p, int(blockIdx.x % p.tiles_n), Tile::BN);
    WeightLoader<Tile, ANY_Y, ANY_X> loader(p, cols, m0);
    int steps = (loader.split.runs + 1) / 2;
    auto load = [&](int step) {
        if (step < steps) {
            bf16* stage = stages + step % STAGES * Tile::STAGE;
#pragma unroll
            for (int kk = 0; kk < 2; kk++) loader.load(2 * step + kk, kk, stage, stage + Tile::BM * BK);
        }
        cp_async_commit();
    };
    Tile tile;
    RowSums<Tile> sums;
    bool summing = cols.takes_sums(p);
    int slot = p.taps[cols.tap].slot;
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) load(s);
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        load(step + STAGES - 1);
        const bf16* stage = stages + step % STAGES * Tile::STAGE;
#pragma unroll
        for (int kk = 0; kk < 2; kk++) {
            uint32_t a[Tile::FRAGS_M][4];
            tile.template multiply<true, true>(a, stage, stage + Tile::BM * BK, kk);
            if (summing) sums.add(p, loader.split, tile, a, 2 * step + kk, m0, slot);
        }
    }
    cp_async_wait<0>();
    tile.each([&](int m, int n, float left, float right) {
        put_weight(p, cols, m0 + m, n, left);
        put_weight(p, cols, m0 + m, n + 1, right);
    });
}

template <int BN> DEV void conv_weight_f32(const ConvWeight& p) {
    SMEM(float, a, [F32_BK * F32_BM]);
    SMEM(float, b, [F32_BK * BN]);
    int m0 = int(blockIdx.x / p.tiles_n) * F32_BM, id = threadIdx.x;
    Columns cols(p, int(blockIdx.x % p.tiles_n), BN);
    Split split(p);
    bool summing = cols.takes_sums(p) && m0 + id < p.oc;
    float sum = 0.0f;
    FmaTile<BN> tile;
    for (int run = 0; run < split.runs; run++) {
        for (int k = 0; k < F32_BK; k++) {
            GridPixel at(p, split.first, split.last, run, k);
            float dy = gradient_at<float>(p, at.y(p, p.taps[cols.tap]), m0 + id);
            a[k * F32_BM + id] = dy;
            sum += dy;
            if (id < BN) b[k * BN + id] = input_at<float>(p, at, cols, id);
        }
        if (summing && ends_segment(p, run)) {
            *sums_at(p, split, run, p.taps[cols.tap].slot, m0 + id) = sum;
            sum = 0.0f;
        }
        __syncthreads();
        tile.multiply(a, b);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 4 * FmaTile<BN>::HALVES; j++)
            put_weight(p, cols, m0 + tile.row() + i, tile.column(j) + j % 4, tile.acc[i][j]);
}

#define WEIGHT(NAME, THREADS, BLOCKS, ...)                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv2d_backward_weight_##NAME(    \
        const __grid_constant__ ConvWeight p) {                                                     \
        conv_weight_bf16<__VA_ARGS__>(p);                                                           \
    }
typedef MmaTile<128, 128, 2, 4> Large;
typedef MmaTile<64, 64, 2, 2> Small;
WEIGHT(128x128, 256, 2, Large, false, false)
WEIGHT(64x64, 128, 4, Small, false, false)
WEIGHT(any_y, 128, 4, Small, true, false)
WEIGHT(any_x, 128, 2, Small, false, true)
WEIGHT(any, 128, 2, Small, true, true)

extern "C" __global__ void __launch_bounds__(F32_THREADS) conv2d_backward_weight_f32(const __grid_constant__ ConvWeight p) {
    conv_weight_f32<64>(p);
}
// At most 32 columns in a tile.
extern "C" __global__ void __launch_bounds__(F32_THREADS) conv2d_backward_weight_f32_narrow(const __grid_constant__ ConvWeight p) {
    conv_weight_f32<32>(p);
}
