// Self-attention: out[i] = Σ_j p[i,j] v[j], p[i,·] = softmax_j(q[i]·k[j]/sqrt(d)), lse[i] = log Σ_j exp(q[i]·k[j]/sqrt(d)).
//   qkv: (n, s, 3·heads·d) bf16, out: (n, s, heads·d) bf16, lse: (n, heads, s) f32; d a multiple of 8, at most D.
// A warp holds 16 queries and their sums in registers, keys and values pass through two stages of shared memory, and the softmax
// is corrected as they come: no matrix of scores is ever written. Moves each operand once; the tiles of one head read
// its keys and values again from L2.   Reference: src/ops/attention.rs.
#include "attention.cuh"

template <class Tile> DEV void attention_forward(bf16* out, float* lse, const bf16* qkv, const Attention& s) {
    constexpr int D = Tile::D, STREAM = Tile::STREAM, STAGES = Tile::STAGES;
    SMEM_DYN(shared);
    bf16* all = shared.take<bf16>(Tile::TEAMS * (Tile::ROWS + 2 * STAGES * STREAM) * D);
    int team = threadIdx.x / Tile::TEAM_THREADS, thread = threadIdx.x % Tile::TEAM_THREADS, warp = thread / 32, lane = thread % 32;
    int tiles = (s.tokens + Tile::ROWS - 1) / Tile::ROWS, pair = blockIdx.x / tiles * Tile::TEAMS + team;
    int first = blockIdx.x % tiles * Tile::ROWS, tokens = pair < s.pairs ? s.tokens : 0;
    pair = min(pair, s.pairs - 1);

    bf16* q = all + team * (Tile::ROWS + 2 * STAGES * STREAM) * D;
    bf16* stages = q + Tile::ROWS * D;
    auto keys = qkv_rows(qkv, s, pair, K), values = qkv_rows(qkv, s, pair, V);
    auto load = [&](int step) {
        bf16* stage = stages + step % STAGES * 2 * STREAM * D;
        copy_rows<STREAM, D, Tile::TEAM_THREADS>(stage, keys, step * STREAM, tokens, s.d, thread);
        copy_rows<STREAM, D, Tile::TEAM_THREADS>(stage + STREAM * D, values, step * STREAM, tokens, s.d, thread);
    };
    copy_rows<Tile::ROWS, D, Tile::TEAM_THREADS>(q, qkv_rows(qkv, s, pair, Q), first, tokens, s.d, thread);
    load(0);
    cp_async_commit();

    bf16* mine = q + 16 * warp * D;
    float acc[D / 8][4] = {}, scale = s.scale * LOG2_E;
    OnlineSoftmax<4> softmax;
    int steps = (s.tokens + STREAM - 1) / STREAM;
    for (int step = 0; step < steps; step++) {
        cp_async_wait<0>();
        __syncthreads();  // this stage has landed for all, and all have done with the other one
        if (STAGES > 1 && step + 1 < steps) load(step + 1);
        cp_async_commit();
        const bf16* stage = stages + step % STAGES * 2 * STREAM * D;
        float scores[STREAM / 8][4];
        rows_by_rows<D, STREAM>(scores, mine, stage);
        if ((step + 1) * STREAM > s.tokens) mask_columns(scores, s.tokens - step * STREAM);
        softmax.step(scores, acc, scale);
        weighted_rows<D, STREAM>(acc, Weights<STREAM>(scores), stage + STREAM * D);
    }
    cp_async_wait<0>();
    softmax.finish();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int i = first + 16 * warp + lane / 4 + 8 * r;
        if (lane % 4 == 0 && i < tokens) lse[int64_t(pair) * s.tokens + i] = softmax.log_sum(r, scale);
    }
    float inverse[2] = {1.0f / softmax.sum[0], 1.0f / softmax.sum[1]};
    store_rows<D>(mine, acc, inverse, out_rows(out, s, pair), first + 16 * warp, tokens, s.d);
}

#define FORWARD(ROWS, D, WARPS, TEAMS, BLOCKS)                                                                         \
    extern "C" __global__ void __launch_bounds__(32 * WARPS * TEAMS, BLOCKS) attention_forward_##ROWS##x##D(          \
        bf16* __restrict__ out, float* __restrict__ lse, const bf16* __restrict__ qkv,                                \
        const __grid_constant__ Attention s) {                                                                        \
        attention_forward<AttentionTile<D, WARPS, TEAMS, D <= 64 ? 64 : 32>>(out, lse, qkv, s);                                          \
    }
// Up to 16 tokens: four heads a block. From 65 on: twice the queries a block, where that still gives enough blocks.
#define FORWARDS(D, BLOCKS, BLOCKS_128) FORWARD(16, D, 1, 4, BLOCKS) FORWARD(64, D, 4, 1, BLOCKS) FORWARD(128, D, 8, 1, BLOCKS_128)
FORWARDS(32, 4, 1)
FORWARDS(64, 3, 1)
FORWARDS(96, 3, 1)
FORWARDS(128, 2, 1)
FORWARDS(144, 2, 1)
FORWARDS(192, 1, 1)
