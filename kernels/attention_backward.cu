// Gradient of self-attention: with p[i,j] = exp(q[i]·k[j]/sqrt(d) - lse[i]), delta[i] = dout[i]·out[i] and
// ds[i,j] = p[i,j] (dout[i]·v[j] - delta[i]):   dq[i] = Σ_j ds[i,j] k[j]/sqrt(d), dk[j] = Σ_i ds[i,j] q[i]/sqrt(d), dv[j] = Σ_i p[i,j] dout[i].
//   qkv, dqkv: (n, s, 3·heads·d), out, dout: (n, s, heads·d) bf16, lse, delta: (n, heads, s) f32; d a multiple of 8, at most D.
// One launch, two kinds of block: rows of queries that sum dq over passing keys, and rows of keys that sum dk and dv over passing
// queries (apart where both do not fit the registers). No atomics; p and ds live in registers. Moves each operand once; the
// blocks of one head share them through L2. delta comes from a pass before.   Reference: src/ops/attention.rs.
#include "attention.cuh"

// What a block sums: dq, dk and dv together, or one of these two.
enum Sums { DQ, DK_DV, DK, DV };

// One kind of block: a1, a2 rest in shared memory, b1, b2 pass: scores = a1 b1^T, dp = a2 b2^T; sums of ds b1 and of p b2.
template <class Tile, Sums SUMS> struct AttentionGradient {
    static constexpr int D = Tile::D, STREAM = Tile::STREAM, STAGES = Tile::STAGES, THREADS = Tile::TEAM_THREADS;
    static constexpr bool BY_KEYS = SUMS != DQ, WANTS_DS = SUMS != DV, WANTS_P = SUMS == DK_DV || SUMS == DV;
    static constexpr int STAGE = 2 * STREAM * D;
    static constexpr int STATISTICS = 2 * STREAM;  // lse and delta of the passing queries

    const Attention& s;
    HeadRows<const bf16> a1, a2, b1, b2;
    const float *lse, *delta;
    int tokens, thread;
    bf16* stages;
    float* statistics;

    DEV void load(int step) const {
        bf16* stage = stages + step % STAGES * STAGE;
        copy_rows<STREAM, D, THREADS>(stage, b1, step * STREAM, tokens, s.d, thread);
        copy_rows<STREAM, D, THREADS>(stage + STREAM * D, b2, step * STREAM, tokens, s.d, thread);
        if (BY_KEYS && thread < STREAM) {
            int i = step * STREAM + thread, from = i < tokens ? i : 0;
            float* to = statistics + step % STAGES * STATISTICS + thread;
            cp_async<4>(to, lse + from, i < tokens ? 4 : 0);
            cp_async<4>(to + STREAM, delta + from, i < tokens ? 4 : 0);
        }
    }

    // Scores to p, and dp to ds (before its factor 1/sqrt(d)). Passing queries beyond the last are zeros: they add nothing.
    DEV void weigh(float (&p)[STREAM / 8][4], float (&ds)[STREAM / 8][4], const float (&row)[2][2], int step) const {
        const float* passing = statistics + step % STAGES * STATISTICS + threadIdx.x % 4 * 2;
#pragma unroll
        for (int j = 0; j < STREAM / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float l = BY_KEYS ? passing[8 * j + e % 2] : row[0][e / 2];
                p[j][e] = exp2_approx((p[j][e] * s.scale - l) * LOG2_E);
                if (WANTS_DS) ds[j][e] = p[j][e] * (ds[j][e] - (BY_KEYS ? passing[STREAM + 8 * j + e % 2] : row[1][e / 2]));
            }
    }

    // Rows first .. of a tile: dq, or dk and dv, to the head's rows of dqkv.
    DEV void run(bf16* resident, const HeadRows<bf16>& to1, const HeadRows<bf16>& to2, int first) const {
        int warp = thread / 32, lane = thread % 32, row0 = first + 16 * warp;
        bf16 *mine1 = resident + 16 * warp * D, *mine2 = mine1 + Tile::ROWS * D;
        copy_rows<Tile::ROWS, D, THREADS>(resident, a1, first, tokens, s.d, thread);
        if (WANTS_DS) copy_rows<Tile::ROWS, D, THREADS>(resident + Tile::ROWS * D, a2, first, tokens, s.d, thread);
        load(0);
        cp_async_commit();
        float row[2][2] = {};
        if (!BY_KEYS) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int i = row0 + lane / 4 + 8 * r;
                if (i < tokens) row[0][r] = lse[i], row[1][r] = delta[i];
            }
        }
        float ds_sum[WANTS_DS ? D / 8 : 1][4] = {}, p_sum[WANTS_P ? D / 8 : 1][4] = {};
        int steps = (s.tokens + STREAM - 1) / STREAM;
        for (int step = 0; step < steps; step++) {
            cp_async_wait<0>();
            __syncthreads();  // this stage has landed for all, and all have done with the other one
            if (STAGES > 1 && step + 1 < steps) load(step + 1);
            cp_async_commit();
            const bf16* stage = stages + step % STAGES * STAGE;
            float p[STREAM / 8][4], ds[STREAM / 8][4];
            rows_by_rows<D, STREAM>(p, mine1, stage);
            if (!BY_KEYS && (step + 1) * STREAM > s.tokens) mask_columns(p, s.tokens - step * STREAM);
            if constexpr (WANTS_DS) rows_by_rows<D, STREAM>(ds, mine2, stage + STREAM * D);
            weigh(p, ds, row, step);
            if constexpr (WANTS_P) weighted_rows<D, STREAM>(p_sum, Weights<STREAM>(p), stage + STREAM * D);
            if constexpr (WANTS_DS) weighted_rows<D, STREAM>(ds_sum, Weights<STREAM>(ds), stage);
        }
        cp_async_wait<0>();
        float scale[2] = {s.scale, s.scale}, one[2] = {1, 1};
        if constexpr (WANTS_DS) store_rows<D>(mine1, ds_sum, scale, to1, row0, tokens, s.d);
        if constexpr (WANTS_P) store_rows<D>(mine2, p_sum, one, to2, row0, tokens, s.d);
    }
};

// Where a block finds its operands. Blocks of one head are neighbours: first those of dq, then those of dk and dv.
struct GradientTensors {
    bf16* dqkv;
    const bf16 *dout, *qkv;
    const float *lse, *delta;
};
template <class Tile, Sums SUMS> DEV void attention_gradient(const GradientTensors& t, const Attention& s, int pair, int tile) {
    using Gradient = AttentionGradient<Tile, SUMS>;
    constexpr int TILES = (2 * Tile::ROWS + 2 * Tile::STAGES * Tile::STREAM) * Tile::D;
    SMEM_DYN(shared);
    int team = threadIdx.x / Tile::TEAM_THREADS;
    bf16* resident = shared.take<bf16>(Tile::TEAMS * TILES) + team * TILES;
    float* statistics = shared.take<float>(Tile::TEAMS * Tile::STAGES * Gradient::STATISTICS) + team * Tile::STAGES * Gradient::STATISTICS;
    pair += team;
    int tokens = pair < s.pairs ? s.tokens : 0;
    pair = min(pair, s.pairs - 1);
    auto q = qkv_rows(t.qkv, s, pair, Q), k = qkv_rows(t.qkv, s, pair, K), v = qkv_rows(t.qkv, s, pair, V);
    auto dout = out_rows(t.dout, s, pair);
    int64_t at = int64_t(pair) * s.tokens;
    Gradient gradient{s, q, dout, k, v, t.lse + at, t.delta + at, tokens, int(threadIdx.x) % Tile::TEAM_THREADS,
                      resident + 2 * Tile::ROWS * Tile::D, statistics};
    if (Gradient::BY_KEYS) gradient.a1 = k, gradient.a2 = v, gradient.b1 = q, gradient.b2 = dout;
    gradient.run(resident, qkv_rows(t.dqkv, s, pair, SUMS == DQ ? Q : K), qkv_rows(t.dqkv, s, pair, V), tile * Tile::ROWS);
}

// Blocks of a group of heads: KINDS * tiles.
template <class Tile> DEV void attention_backward(const GradientTensors& t, const Attention& s) {
    constexpr bool APART = Tile::D >= 128;
    constexpr int KINDS = APART ? 3 : 2;
    int tiles = (s.tokens + Tile::ROWS - 1) / Tile::ROWS;
    int tile = blockIdx.x % tiles, kind = blockIdx.x / tiles % KINDS, pair = blockIdx.x / tiles / KINDS * Tile::TEAMS;
    if (kind == 0) return attention_gradient<Tile, DQ>(t, s, pair, tile);
    if constexpr (APART) {
        if (kind == 1) return attention_gradient<Tile, DK>(t, s, pair, tile);
        attention_gradient<Tile, DV>(t, s, pair, tile);
    } else {
        attention_gradient<Tile, DK_DV>(t, s, pair, tile);
    }
}

#define BACKWARD(ROWS, D, WARPS, TEAMS, BLOCKS)                                                                        \
    extern "C" __global__ void __launch_bounds__(32 * WARPS * TEAMS, BLOCKS) attention_backward_##ROWS##x##D(         \
        bf16* __restrict__ dqkv, const bf16* __restrict__ dout, const bf16* __restrict__ qkv,                         \
        const float* __restrict__ lse, const float* __restrict__ delta, const __grid_constant__ Attention s) {        \
        attention_backward<AttentionTile<D, WARPS, TEAMS, D <= 144 ? 32 : 16>>({dqkv, dout, qkv, lse, delta}, s);                         \
    }
#define BACKWARDS(D, BLOCKS) BACKWARD(16, D, 1, 4, BLOCKS) BACKWARD(64, D, 4, 1, BLOCKS)
BACKWARDS(32, 3)
BACKWARDS(64, 2)
BACKWARDS(96, 2)
BACKWARDS(128, 2)
BACKWARDS(144, 2)
BACKWARDS(192, 1)
BACKWARD(128, 32, 8, 1, 1)
BACKWARD(128, 64, 8, 1, 1)
BACKWARD(128, 96, 8, 1, 1)
BACKWARD(128, 128, 8, 1, 1)

// delta: (n, heads, s), the sum of dout·out over the channels of a head; eight lanes to a sum, in a fixed tree.
template <class T> DEV void attention_delta(float* delta, const T* dout, const T* out, const Attention& s) {
    constexpr int WIDE = 16 / sizeof(T);
    int64_t id = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 8, count = int64_t(s.pairs) * s.tokens;
    int lane = threadIdx.x % 8;
    float sum = 0;
    if (id < count) {
        const T *a = dout + id * s.d, *b = out + id * s.d;
        if (s.d % WIDE == 0) {
            for (int e = lane * WIDE; e < s.d; e += 8 * WIDE) {
                auto x = *reinterpret_cast<const Vec<T, WIDE>*>(a + e), y = *reinterpret_cast<const Vec<T, WIDE>*>(b + e);
#pragma unroll
                for (int i = 0; i < WIDE; i++) sum = __fmaf_rn(to_float(x[i]), to_float(y[i]), sum);
            }
        } else {
            for (int e = lane; e < s.d; e += 8) sum = __fmaf_rn(to_float(a[e]), to_float(b[e]), sum);
        }
    }
#pragma unroll
    for (int x = 1; x < 8; x *= 2) sum += __shfl_xor_sync(FULL_MASK, sum, x);
    if (lane == 0 && id < count) {
        int64_t head = id % s.heads, row = id / s.heads;
        delta[(row / s.tokens * s.heads + head) * s.tokens + row % s.tokens] = sum;
    }
}
#define DELTA(NAME, T)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256) attention_delta_##NAME(                                         \
        float* __restrict__ delta, const T* __restrict__ dout, const T* __restrict__ out, const __grid_constant__ Attention s) { \
        attention_delta<T>(delta, dout, out, s);                                                                      \
    }
DELTA(f32, float)
DELTA(bf16, bf16)
