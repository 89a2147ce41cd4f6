// What the attention kernels share: where a head's rows lie, tiles of them in shared memory, products of 16 rows by one warp.
//
// Tile rows are permuted so that neither copies nor ldmatrix meet in a bank, whatever the width. A fragment of scores, 16 x N, has
// its rows g and g + 8 (g = lane/4) in each lane; four lanes share a row. Reference: src/ops/attention.rs.
#pragma once
#include "ptx.cuh"

constexpr float LOG2_E = 1.4426950408889634f;

// Argument of every kernel.
struct Attention {
    int32_t tokens, heads, d, pairs;  // pairs of image and head
    int32_t part_step, head_step;     // elements from q to k to v, and from one head's q to the next one's
    float scale;                      // of q·k: 1/sqrt(d)
    int32_t unused;
};

// The rows of one head in a tensor, one per token; an image has at most 2^30 elements.
template <class T> struct HeadRows {
    T* p;
    int stride;
    DEV T* row(int i) const { return p + i * stride; }
};
enum Part { Q, K, V };
template <class T> DEV HeadRows<T> qkv_rows(T* qkv, const Attention& s, int pair, Part part) {
    int stride = 3 * s.heads * s.d;
    return {qkv + int64_t(pair / s.heads) * (s.tokens * stride) + pair % s.heads * s.head_step + part * s.part_step, stride};
}
template <class T> DEV HeadRows<T> out_rows(T* out, const Attention& s, int pair) {
    int stride = s.heads * s.d;
    return {out + int64_t(pair / s.heads) * (s.tokens * stride) + pair % s.heads * s.d, stride};
}

// Element of a tile where 16-byte chunk `chunk` of row `row` lies: eight rows of one chunk, and eight chunks in a row, have eight bank groups.
template <int CHUNKS> DEV int slot(int row, int chunk) {
    constexpr int SHIFT = CHUNKS % 8 == 0 ? 0 : CHUNKS % 4 == 0 ? 1 : 2, MASK = 7 >> SHIFT;
    static_assert(CHUNKS % 2 == 0);
    return (row * CHUNKS + (chunk ^ (row >> SHIFT & MASK))) * 8;
}

// Starts the copies of ROWS tokens from `first` on by THREADS threads; zeros past the last token and the last channel.
template <int ROWS, int D, int THREADS>
DEV void copy_rows(bf16* tile, const HeadRows<const bf16>& from, int first, int tokens, int d, int thread) {
    constexpr int CHUNKS = D / 8;
#pragma unroll
    for (int i = 0; i < (ROWS * CHUNKS + THREADS - 1) / THREADS; i++) {
        int id = thread + i * THREADS, r = id / CHUNKS, c = id % CHUNKS;
        if (ROWS * CHUNKS % THREADS != 0 && id >= ROWS * CHUNKS) break;
        bool ok = first + r < tokens && 8 * c < d;
        cp_async16(tile + slot<CHUNKS>(r, c), ok ? from.row(first + r) + 8 * c : from.p, ok ? 16 : 0);
    }
}

// s (16 x N) = [s +] a (16 x D) b (N x D)^T, both tiles in shared memory.
template <int D, int N, bool ADD = false> DEV void rows_by_rows(float (&s)[N / 8][4], const bf16* a, const bf16* b) {
    int l = threadIdx.x % 32;
    if constexpr (!ADD) {
#pragma unroll
        for (int j = 0; j < N / 8; j++) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0;
    }
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t fa[4], fb[4];
        ldmatrix_x4(fa, a + slot<D / 8>(l % 16, 2 * k + l / 16));
#pragma unroll
        for (int j = 0; j < N / 16; j++) {
            ldmatrix_x4(fb, b + slot<D / 8>(16 * j + l / 16 * 8 + l % 8, 2 * k + l / 8 % 2));
            mma_bf16_16816(s[2 * j], fa, fb[0], fb[1]);
            mma_bf16_16816(s[2 * j + 1], fa, fb[2], fb[3]);
        }
    }
}

// Weights in pairs of bf16, as the left operand of a product.
template <int N> struct Weights {
    uint32_t a[N / 16][4];
    DEV explicit Weights(const float (&s)[N / 8][4]) {
#pragma unroll
        for (int k = 0; k < N / 16; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* pair = &s[2 * k + i / 2][i % 2 * 2];
                bf162 rounded = __floats2bfloat162_rn(pair[0], pair[1]);
                a[k][i] = *reinterpret_cast<uint32_t*>(&rounded);
            }
    }
};

// acc (16 x D) += w (16 x N) b (N x D).
template <int D, int N> DEV void weighted_rows(float (&acc)[D / 8][4], const Weights<N>& w, const bf16* b) {
    int l = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < N / 16; k++)
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            uint32_t fb[4];
            ldmatrix_x4_trans(fb, b + slot<D / 8>(16 * k + l % 16, 2 * j + l / 16));
            mma_bf16_16816(acc[2 * j], w.a[k], fb[0], fb[1]);
            mma_bf16_16816(acc[2 * j + 1], w.a[k], fb[2], fb[3]);
        }
}

// The softmax of two rows per lane as their scores arrive, LANES lanes to a row; scores in base 2: s * scale * log2(e).
template <int LANES> struct OnlineSoftmax {
    float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

    // Scores to exp(score - largest so far); what was summed before shrinks by the same.
    template <int N, int A> DEV void step(float (&s)[N][4], float (&acc)[A][4], float scale) {
        float base[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float largest = max[r];
#pragma unroll
            for (int j = 0; j < N; j++) largest = fmaxf(largest, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
#pragma unroll
            for (int x = 1; x < LANES; x *= 2) largest = fmaxf(largest, __shfl_xor_sync(FULL_MASK, largest, x));
            float shrink = exp2_approx((max[r] - largest) * scale);
            max[r] = largest, base[r] = largest * scale, sum[r] *= shrink;
#pragma unroll
            for (int j = 0; j < A; j++) acc[j][2 * r] *= shrink, acc[j][2 * r + 1] *= shrink;
        }
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[j][e] = exp2_approx(__fmaf_rn(s[j][e], scale, -base[e / 2]));
                sum[e / 2] += s[j][e];
            }
    }
    // After the last step: the sum of each row in all its lanes.
    DEV void finish() {
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int x = 1; x < LANES; x *= 2) sum[r] += __shfl_xor_sync(FULL_MASK, sum[r], x);
    }
    // Log of the sum of exp(score), natural; `scale` as in `step`.
    DEV float log_sum(int r, float scale) const { return (max[r] * scale + log2f(sum[r])) / LOG2_E; }
};

// Scores of the columns from `count` on (this lane's: 8j + 2t and the next) become -infinity.
template <int N> DEV void mask_columns(float (&s)[N][4], int count) {
    int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (8 * j + column + e % 2 >= count) s[j][e] = -INFINITY;
}

// Writes rows first .. first + 16 of the warp's results, times `factor`, by way of 16 rows of shared memory that only this warp uses.
template <int D>
DEV void store_rows(bf16* staged, const float (&acc)[D / 8][4], const float (&factor)[2], const HeadRows<bf16>& to, int first, int tokens, int d) {
    int l = threadIdx.x % 32, g = l / 4, t = l % 4;
#pragma unroll
    for (int j = 0; j < D / 8; j++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            bf162 pair = __floats2bfloat162_rn(acc[j][2 * r] * factor[r], acc[j][2 * r + 1] * factor[r]);
            *reinterpret_cast<bf162*>(staged + slot<D / 8>(g + 8 * r, j) + 2 * t) = pair;
        }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        int id = l + 32 * i, r = id / (D / 8), c = id % (D / 8);
        if (first + r < tokens && 8 * c < d)
            *reinterpret_cast<uint4*>(to.row(first + r) + 8 * c) = *reinterpret_cast<const uint4*>(staged + slot<D / 8>(r, c));
    }
}

// How a block is cut: TEAMS pairs of image and head, WARPS warps of 16 resident rows each, against streamed tiles of STREAM rows.
template <int WIDTH, int W, int T, int S> struct AttentionTile {
    static constexpr int D = WIDTH, WARPS = W, TEAMS = T, ROWS = 16 * W, THREADS = 32 * W * T, TEAM_THREADS = 32 * W;
    static constexpr int STREAM = W == 1 ? 16 : S, STAGES = W == 1 ? 1 : 2;  // one warp: all tokens at once
};
