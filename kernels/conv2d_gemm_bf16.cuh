// The GEMM of conv2d_gemm.cuh in bf16 with f32 accumulation: cp.async through four stages, ldmatrix, mma.sync.
//
// Copies are 16 bytes: eight channels of one source, so both channel counts must be multiples of 8. The variant ANY loads
// element by element and counts k through taps and channels, so that 1, 3 or 6 channels waste nothing.
// Bytes: every operand once from device memory; A is read again under each tap and B by each tile of m, from L2.
#pragma once
#include "conv2d_gemm.cuh"
#include "conv2d_mma.cuh"

template <class Tile, bool TRANSPOSED, bool ANY> struct GemmLoader {
    static constexpr int A_CHUNKS = BK / 8, B_CHUNKS = TRANSPOSED ? Tile::BN / 8 : BK / 8;  // per row in shared memory
    static constexpr int A_APART = Tile::THREADS / A_CHUNKS, B_APART = Tile::THREADS / B_CHUNKS;  // rows that one thread copies
    static_assert(A_APART % 8 == 0 && B_APART % 8 == 0, "the rows of a thread are permuted alike");

    const ConvGemm& p;
    int n0, first, last, columns, a_row, a_chunk, b_row, b_chunk;
    int tap, s, c;  // channel c of source s under a tap; the channels of each source are rounded up to whole blocks
    GridRow rows[Tile::COPIES_A];
    // Where the next copies come from. Bit i of `inside_image`: row i of A lies inside under this tap.
    const bf16 *a[Tile::COPIES_A], *b[Tile::COPIES_B];
    uint32_t inside_image;

    DEV GemmLoader(const ConvGemm& p, int m0, int n0, int first, int last)
        : p(p), n0(n0), first(first), last(last), columns(p.out_channels[0] + p.out_channels[1]), a_row(threadIdx.x / A_CHUNKS),
          a_chunk(threadIdx.x % A_CHUNKS), b_row(threadIdx.x / B_CHUNKS), b_chunk(threadIdx.x % B_CHUNKS), tap(first), s(0), c(0) {
#pragma unroll
        for (int i = 0; i < Tile::COPIES_A; i++) rows[i] = GridRow(p, m0 + a_row + i * A_APART);
        if (!ANY) turn();
    }

    DEV int steps() const {
        auto blocks = [](int n) { return (n + BK - 1) / BK; };
        if (ANY) return blocks((last - first) * (p.a_channels[0] + p.a_channels[1]));
        return (last - first) * (blocks(p.a_channels[0]) + blocks(p.a_channels[1]));
    }

    // Goes on to the next source or tap where one is used up.
    DEV void follow() {
        if (ANY || c < p.a_channels[s]) return;
        c = 0;
        if (s == 0 && p.a_channels[1] > 0) s = 1;
        else s = 0, tap++;
        if (tap < last) turn();
    }

    // Starts the copies of the next 32 values of k into a stage, of zeros unless there are `more`: without a branch, so that the compiler can put
    // them between products.
    DEV void load(int step, bool more, bf16* sa, bf16* sb) {
        if constexpr (ANY) {
            if (more) load_any(step * BK, sa, sb);
            return;
        }
        int left = more ? p.a_channels[s] - c : 0;
        int64_t b_step = TRANSPOSED ? int64_t(BK) * p.w_taps * p.w_channels : BK;
        sa += swizzled<A_CHUNKS>(a_row, a_chunk), sb += swizzled<B_CHUNKS>(b_row, b_chunk);
#pragma unroll
        for (int i = 0; i < Tile::COPIES_A; i++) {
            bool ok = (inside_image >> i & 1) && a_chunk * 8 < left;
            cp_async16(sa + i * A_APART * BK, a[i], ok ? 16 : 0);
            a[i] += BK;
        }
#pragma unroll
        for (int i = 0; i < Tile::COPIES_B; i++) {
            int r = b_row + i * B_APART, k = TRANSPOSED ? r : b_chunk * 8, n = n0 + (TRANSPOSED ? b_chunk * 8 : r);
            cp_async16(sb + i * B_APART * B_CHUNKS * 8, b[i], k < left && n < columns ? 16 : 0);
            b[i] += b_step;
        }
        c += BK;
    }

    // A new tap or source: the addresses at its first channels, from which the steps then go on. Those that lie outside are not read.
    DEV void turn() {
        Tap under = p.taps[tap];
        int channels = p.a_channels[s], before = s ? p.a_channels[0] : 0;
        inside_image = 0;
#pragma unroll
        for (int i = 0; i < Tile::COPIES_A; i++) {
            int pixel = rows[i].pixel(p, under);
            inside_image |= uint32_t(pixel >= 0) << i;
            a[i] = static_cast<const bf16*>(p.a[s]) + int64_t(max(pixel, 0)) * channels + a_chunk * 8;
        }
#pragma unroll
        for (int i = 0; i < Tile::COPIES_B; i++) {
            int r = b_row + i * B_APART;
            int64_t o = TRANSPOSED ? before + r : n0 + r;
            int channel = TRANSPOSED ? n0 + b_chunk * 8 : before + b_chunk * 8;
            b[i] = static_cast<const bf16*>(p.w) + (o * p.w_taps + under.w) * p.w_channels + channel;
        }
    }

    DEV void load_any(int k0, bf16* sa, bf16* sb) const {
        bf16 v[8];
#pragma unroll
        for (int i = 0; i < Tile::COPIES_A; i++) {
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] = gathered<bf16>(p, rows[i], k0 + a_chunk * 8 + e, first, last);
            store_chunk(sa + swizzled<A_CHUNKS>(a_row + i * A_APART, a_chunk), v);
        }
#pragma unroll
        for (int i = 0; i < Tile::COPIES_B; i++) {
            int r = b_row + i * B_APART;
#pragma unroll
            for (int e = 0; e < 8; e++) {
                int c = b_chunk * 8 + e, k = k0 + (TRANSPOSED ? r : c), n = n0 + (TRANSPOSED ? c : r);
                v[e] = weight<bf16, TRANSPOSED>(p, n, k, first, last);
            }
            store_chunk(sb + swizzled<B_CHUNKS>(r, b_chunk), v);
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
        bf16* stage = stages + step % STAGES * Tile::STAGE;
        loader.load(step, step < steps, stage, stage + Tile::BM * BK);
        cp_async_commit();  // of zeros too: the count of groups is the clock
    };
    Tile tile;
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        load(s);
        loader.follow();
    }
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // this stage has landed for all, and all have done with the one to be overwritten
        const bf16* stage = stages + step % STAGES * Tile::STAGE;
        uint32_t a[Tile::FRAGS_M][4];
        tile.template multiply<false, TRANSPOSED>(a, stage, stage + Tile::BM * BK, 0);
        load(step + STAGES - 1);
        tile.template multiply<false, TRANSPOSED>(a, stage, stage + Tile::BM * BK, 1);
        loader.follow();
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
    // Rows at a time: their addends are all on the way before the first is written.
    constexpr int QUADS = Tile::BN / 4, APART = Tile::THREADS / QUADS, ROWS = 4;
    static_assert(Tile::BM % (ROWS * APART) == 0, "whole turns");
    int n = threadIdx.x % QUADS * 4;
#pragma unroll 1
    for (int m = threadIdx.x / QUADS; m < Tile::BM; m += ROWS * APART) {
        Quad at[ROWS];
        float v[ROWS][4];
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            at[i] = Quad(p, Target(p, m0 + m + i * APART, phase), n0 + n);
            Vec<float, 4> quad = *reinterpret_cast<const Vec<float, 4>*>(out + staged(m + i * APART, n, Tile::BN));
            for (int e = 0; e < 4; e++) v[i][e] = quad[e];
        }
#pragma unroll
        for (int i = 0; i < ROWS; i++) at[i].template add<bf16>(p, v[i]);
#pragma unroll
        for (int i = 0; i < ROWS; i++) at[i].template write<bf16>(p, v[i]);
        if (!TRANSPOSED && p.sums) {
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                Vec<float, 4> quad;
                for (int e = 0; e < 4; e++) quad[e] = v[i][e];
                *reinterpret_cast<Vec<float, 4>*>(out + staged(m + i * APART, n, Tile::BN)) = quad;
            }
        }
    }
    if (TRANSPOSED || !p.sums) return;
    __syncthreads();
    int column = threadIdx.x % Tile::BN;
    for (int m = threadIdx.x / Tile::BN * PART_ROWS; m < Tile::BM; m += Tile::THREADS / Tile::BN * PART_ROWS) {
        part_sums(p, phase, m0 + m, n0 + column, [&](int i) { return out[staged(m + i, column, Tile::BN)]; });
    }
}
