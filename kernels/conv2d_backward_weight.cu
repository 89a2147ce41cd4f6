// Gradients of a convolution's parameters: conv2d_weight.cuh by tensor cores (bf16 in, f32 out) and by plain f32.
//   dy: (n, oh, ow, oc), x: (n, h, w, ca) and (n, h, w, cb), dw: (oc, taps, ca + cb) f32, bias and time shift from the row sums.
// dy and x come from device memory once and again from L2, by each tile of columns and of o; so do the partial sums of the splits.
#include "conv2d_gemm_f32.cuh"
#include "conv2d_mma.cuh"
#include "conv2d_weight.cuh"

// Copies pairs of runs of 16 pixels to shared memory, pixels as rows; ANY_Y, ANY_X: that operand element by element.
// The pixels are found before, a step by each warp, and lie in a ring in shared memory: two rounds of as many steps as there are warps.
template <class Tile, bool ANY_Y, bool ANY_X> struct WeightLoader {
    static constexpr int CHUNKS = Tile::BM / 8, APART = Tile::THREADS / CHUNKS, WARPS = Tile::THREADS / 32, RING = 2 * WARPS * BK;
    static_assert(Tile::BM == Tile::BN && APART % 8 == 0, "both operands are cut alike, and the rows of a thread permuted alike");
    static_assert(WARPS >= STAGES, "a round is found before its first copies start");

    const ConvWeight& p;
    const Columns& cols;
    const Split& split;
    int2* ring;  // pixel of dy and of x
    int m0;

    // All warps together find the steps of the round that begins with `step`.
    DEV void find(int step) {
        step += threadIdx.x / 32;
        int place = threadIdx.x % 32;
        GridPixel at(p, split.first, split.last, 2 * step + place / 16, place % 16);
        WeightTap tap = p.taps[cols.tap];
        ring[(step * BK + place) % RING] = make_int2(at.y(p, tap), at.x(p, tap));
    }
    DEV void load(int step, bf16* sa, bf16* sb) const {
        int chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS, to = swizzled<CHUNKS>(first, chunk);
#pragma unroll
        for (int row = 0; row < BK; row += APART) {
            int2 at = ring[(step * BK + first + row) % RING];
            load_y(at.x, m0 + chunk * 8, sa + to + row * CHUNKS * 8);
            load_x(at.y, chunk * 8, step * BK + first + row, sb + to + row * CHUNKS * 8);
        }
    }
    DEV void load_y(int pixel, int m, bf16* to) const {
        if constexpr (ANY_Y) {
            bf16 v[8];
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] = gradient_at<bf16>(p, pixel, m + e);
            store_chunk(to, v);
        } else {
            const bf16* dy = static_cast<const bf16*>(p.dy);
            cp_async16(to, dy + int64_t(max(pixel, 0)) * p.oc + m, pixel >= 0 && m < p.oc ? 16 : 0);
        }
    }
    DEV void load_x(int pixel, int column, int k, bf16* to) const {
        if constexpr (ANY_X) {
            GridPixel at(p, split.first, split.last, k / 16, k % 16);  // each column may have its own tap
            bf16 v[8];
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] = input_at<bf16>(p, at, cols, column + e);
            store_chunk(to, v);
        } else {
            const bf16* x = static_cast<const bf16*>(p.x[cols.s]) + cols.c0 + column;
            cp_async16(to, x + int64_t(max(pixel, 0)) * p.x_channels[cols.s], pixel >= 0 && column < cols.count ? 16 : 0);
        }
    }
};

// Row sums of dy by products with a matrix of ones: the warps that share rows take the same number of fragments of them each.
template <class Tile> struct RowSums {
    static constexpr uint32_t ONES = 0x3f803f80;
    static constexpr int MINE = Tile::FRAGS_M * Tile::WN / Tile::BN;
    static_assert(MINE * Tile::BN == Tile::FRAGS_M * Tile::WN, "as many fragments of rows for each warp");
    float acc[MINE][4] = {};

    DEV void add(const ConvWeight& p, const Split& split, const Tile& tile, const uint32_t (&a)[Tile::FRAGS_M][4], int run, int m0,
                 int tap) {
        int first = tile.warp_n() / Tile::WN * MINE;
#pragma unroll
        for (int i = 0; i < Tile::FRAGS_M; i++)
            if (i / MINE * MINE == first) mma_bf16_16816(acc[i % MINE], a[i], ONES, ONES);
        if (run >= split.runs || !ends_segment(p, run)) return;
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            int o = m0 + tile.warp_m() + 16 * (first + i) + tile.lane() / 4, slot = p.taps[tap].slot;
            if (tile.lane() % 4 == 0) {
                if (o < p.oc) *sums_at(p, split, run, slot, o) = acc[i][0];
                if (o + 8 < p.oc) *sums_at(p, split, run, slot, o + 8) = acc[i][2];
            }
            acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.0f;
        }
    }
};

template <class Tile, bool ANY_Y, bool ANY_X> DEV void conv_weight_bf16(const ConvWeight& p) {
    SMEM_DYN(shared);
    bf16* stages = shared.take<bf16>(STAGES * Tile::STAGE);
    typedef WeightLoader<Tile, ANY_Y, ANY_X> Loader;
    SMEM(int2, ring, [Loader::RING]);
    int m0 = int(blockIdx.x / p.tiles_n) * Tile::BM;
    Columns cols(p, int(blockIdx.x % p.tiles_n), Tile::BN);
    Split split(p);
    Loader loader{p, cols, split, ring, m0};
    int steps = (split.runs + 1) / 2;
    // Beyond the last step the pixels are -1 and the copies zeros. There is no branch in it, so that the compiler can put it between products.
    auto load = [&](int step) {
        bf16* stage = stages + step % STAGES * Tile::STAGE;
        loader.load(step, stage, stage + Tile::BM * BK);
        cp_async_commit();
    };
    Tile tile;
    RowSums<Tile> sums;
    bool summing = cols.takes_sums(p);
    loader.find(0);
    __syncthreads();
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) load(s);
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        if (step % Loader::WARPS == 0) loader.find(step + Loader::WARPS);
        const bf16* stage = stages + step % STAGES * Tile::STAGE;
#pragma unroll
        for (int kk = 0; kk < 2; kk++) {
            uint32_t a[Tile::FRAGS_M][4];
            tile.template multiply<true, true>(a, stage, stage + Tile::BM * BK, kk);
            if (kk == 0) load(step + STAGES - 1);
            if (summing) sums.add(p, split, tile, a, 2 * step + kk, m0, cols.tap);
        }
    }
    cp_async_wait<0>();
    tile.each([&](int m, int n, float left, float right) {
        if constexpr (ANY_X) {
            Vec<float, 1> one;
            one[0] = left;
            put_weights(p, cols, m0 + m, n, one);
            one[0] = right;
            put_weights(p, cols, m0 + m, n + 1, one);
        } else {
            Vec<float, 2> pair;
            pair[0] = left, pair[1] = right;
            put_weights(p, cols, m0 + m, n, pair);
        }
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
#pragma unroll 1
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
        for (int j = 0; j < 4 * FmaTile<BN>::HALVES; j++) {
            Vec<float, 1> one;
            one[0] = tile.acc[i][j];
            put_weights(p, cols, m0 + tile.row() + i, tile.column(j) + j % 4, one);
        }
}

#define WEIGHT(NAME, THREADS, BLOCKS, ...)                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv2d_backward_weight_##NAME(    \
        const __grid_constant__ ConvWeight p) {                                                     \
        conv_weight_bf16<__VA_ARGS__>(p);                                                           \
    }
typedef MmaTile<128, 128, 2, 2> Large;
typedef MmaTile<64, 64, 2, 2> Small;
WEIGHT(128x128, 128, 2, Large, false, false)
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
