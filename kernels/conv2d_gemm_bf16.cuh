// The GEMM of conv2d_gemm.cuh in bf16 with f32 accumulation: cp.async through four stages, ldmatrix, mma.sync.
//
// Copies are 16 bytes: eight channels of one source, so both channel counts must be multiples of 8. The variant ANY loads
// element by element and counts k through taps and channels, so that 1, 3 or 6 channels waste nothing.
// Bytes: every operand once from device memory; A is read again under each tap and B by each tile of m, from L2.
#pragma once
#include "conv2d_gemm.cuh"
#include "conv2d_mma.cuh"

template <class Tile, bool TRANSPOSED, bool ANY> struct GemmLoader {
    static constexpr int B_CHUNKS = TRANSPOSED ? Tile::BN / 8 : BK / 8;  // per row of B in shared memory
    static constexpr int ROWS_APART = Tile::THREADS / (BK / 8);        // rows of A that one thread copies

    const ConvGemm& p;
    int n0, first, last, chunk, row;
    Position at;
    GridRow rows[Tile::COPIES_A];

    DEV GemmLoader(const ConvGemm& p, int m0, int n0, int first, int last)
        : p(p), n0(n0), first(first), last(last), chunk(threadIdx.x % (BK / 8)), row(threadIdx.x / (BK / 8)), at{first, 0, 0} {
#pragma unroll
        for (int i = 0; i < Tile::COPIES_A; i++) rows[i] = GridRow(p, m0 + row + i * ROWS_APART);
    }

    DEV int steps() const {
        auto blocks = [](int n) { return (n + BK - 1) / BK; };
        if (ANY) return blocks((last - first) * (p.a_channels[0] + p.a_channels[1]));
        return (last - first) * (blocks(p.a_channels[0]) + blocks(p.a_channels[1]));
    }

    // Starts the copies of the next 32 values of k into a stage.
    DEV void load(int step, bf16* sa, bf16* sb) {
        if constexpr (ANY) {
            load_any(step * BK, sa, sb);
        } else {
            Tap tap = p.taps[at.tap];
            int channels = p.a_channels[at.s], c = at.c + chunk * 8;
            const bf16* a = static_cast<const bf16*>(p.a[at.s]);
#pragma unroll
            for (int i = 0; i < Tile::COPIES_A; i++) {
                int pixel = c < channels ? rows[i].pixel(p, tap) : -1, r = row + i * ROWS_APART;
                cp_async16(sa + swizzled<BK / 8>(r, chunk), pixel < 0 ? a : a + int64_t(pixel) * channels + c, pixel < 0 ? 0 : 16);
            }
            load_weights(tap, channels, sb);
            at.advance(p, BK);
        }
    }

    DEV void load_weights(Tap tap, int channels, bf16* sb) const {
        const bf16* w = static_cast<const bf16*>(p.w);
        int columns = p.out_channels[0] + p.out_channels[1];
#pragma unroll
        for (int i = 0; i < Tile::COPIES_B; i++) {
            int id = threadIdx.x + i * Tile::THREADS, r = id / B_CHUNKS, ch = id % B_CHUNKS;
            int k = at.c + (TRANSPOSED ? r : ch * 8), n = n0 + (TRANSPOSED ? ch * 8 : r);
            bool ok = k < channels && n < columns;
            int c = k + (at.s ? p.a_channels[0] : 0), o = TRANSPOSED ? c : n;
            int64_t from = (int64_t(o) * p.w_taps + tap.w) * p.w_channels + (TRANSPOSED ? n : c);
            cp_async16(sb + swizzled<B_CHUNKS>(r, ch), ok ? w + from : w, ok ? 16 : 0);
        }
    }

    DEV void load_any(int k0, bf16* sa, bf16* sb) const {
        bf16 v[8];
#pragma unroll
        for (int i = 0; i < Tile::COPIES_A; i++) {
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] = gathered<bf16>(p, rows[i], k0 + chunk * 8 + e, first, last);
            store_chunk(sa + swizzled<BK / 8>(row + i * ROWS_APART, chunk), v);
        }
#pragma unroll
        for (int i = 0; i < Tile::COPIES_B; i++) {
            int id = threadIdx.x + i * Tile::THREADS, r = id / B_CHUNKS, ch = id % B_CHUNKS;
#pragma unroll
            for (int e = 0; e < 8; e++) {
                int k = k0 + (TRANSPOSED ? r : ch * 8 + e), n = n0 + (TRANSPOSED ? ch * 8 + e : r);
                v[e] = weight<bf16, TRANSPOSED>(p, n, k, first, last);
            }
            store_chunk(sb + swizzled<B_CHUNKS>(r, ch), v);
        }
    }
};

template <class Tile, bool TRANSPOSED, bool ANY> DEV void conv_gemm_bf16(const ConvGemm& p) {
    SMEM_DYN(shared);
    bf16* stages = shared.take<bf16>(STAGES * Tile::STAGE);
    int phase = blockIdx.z, n0 = int(blockIdx.x % p.tiles_n) * Tile::BN, m0 = int(blockIdx.x / p.tiles_n) * Tile::BM;
    GemmLoader<Tile, TRANSPOSED, ANY> loader(p, m0, n0, p.first_tap[phase], p.first_tap[phase + 1]);
    int steps = loader.steps();
    auto load = [&](int step) {
        if (step < steps) {
            bf16* stage = stages + step % STAGES * Tile::STAGE;
            loader.load(step, stage, stage + Tile::BM * BK);
        }
        cp_async_commit();  // an empty group too: the count of groups is the clock
    };
    Tile tile;
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) load(s);
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // this stage has landed for all, and all have done with the one to be overwritten
        load(step + STAGES - 1);
        const bf16* stage = stages + step % STAGES * Tile::STAGE;
        uint32_t a[Tile::FRAGS_M][4];
#pragma unroll
        for (int kk = 0; kk < BK / 16; kk++) tile.template multiply<false, TRANSPOSED>(a, stage, stage + Tile::BM * BK, kk);
    }
    cp_async_wait<0>();
    __syncthreads();
    float* out = reinterpret_cast<float*>(stages);
    tile.each([&](int m, int n, float left, float right) {
        Vec<float, 2> pair;
        pair[0] = left, pair[1] = right;
        *reinterpret_cast<Vec<float, 2>*>(out + staged(m, n, Tile::BN)) = pair;
    });
    __syncthreads();
    constexpr int QUADS = Tile::BN / 4;
    int n = threadIdx.x % QUADS * 4;
    for (int m = threadIdx.x / QUADS; m < Tile::BM; m += Tile::THREADS / QUADS) {
        Vec<float, 4> quad = *reinterpret_cast<const Vec<float, 4>*>(out + staged(m, n, Tile::BN));
        float v[4] = {quad[0], quad[1], quad[2], quad[3]};
        put<bf16>(p, Target(p, m0 + m, phase), n0 + n, v);
        if (!TRANSPOSED && p.sums) {
            for (int e = 0; e < 4; e++) quad[e] = v[e];
            *reinterpret_cast<Vec<float, 4>*>(out + staged(m, n, Tile::BN)) = quad;
        }
    }
    if (TRANSPOSED || !p.sums) return;
    __syncthreads();
    int column = threadIdx.x % Tile::BN;
    for (int m = threadIdx.x / Tile::BN * PART_ROWS; m < Tile::BM; m += Tile::THREADS / Tile::BN * PART_ROWS) {
        part_sums(p, phase, m0 + m, n0 + column, [&](int i) { return out[staged(m + i, column, Tile::BN)]; });
    }
}
