// Self-attention and its gradient for heads of any width, f32 and bf16: the equations of attention.cu and attention_backward.cu.
//   qkv, dqkv: (n, s, 3·heads·d), out, dout: (n, s, heads·d), lse, delta: (n, heads, s) f32.
// A block makes one slice of the result's channels (64 in f32, 128 in bf16) for a tile of rows, so wide heads find their scores once
// per slice. The checking path (f32), and widths that are no multiples of 8 or above 192.   Reference: src/ops/attention.rs.
#include "attention_engines.cuh"

// Which rows, head and slice of channels a block works on; slices of one tile are neighbours.
template <class E> struct Share {
    int first, channel, pair, kind;
    DEV Share(const Attention& s, int kinds) {
        int slices = (s.d + E::SLICE - 1) / E::SLICE, tiles = (s.tokens + E::ROWS - 1) / E::ROWS, b = blockIdx.x;
        channel = b % slices * E::SLICE, b /= slices;
        first = b % tiles * E::ROWS, b /= tiles;
        kind = b % kinds, pair = b / kinds;
    }
};

template <class E>
DEV void store_slice(const E& e, const float (&acc)[E::RESULTS][4], const float (&factor)[2], const HeadRows<typename E::T>& to, const Share<E>& at, const Attention& s) {
#pragma unroll
    for (int j = 0; j < E::RESULTS; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int r = at.first + e.row(i / 2), c = at.channel + e.column(j, i);
            if (r < s.tokens && c < s.d) to.row(r)[c] = from_float<typename E::T>(acc[j][i] * factor[i / 2]);
        }
}

template <class E> DEV void mask_passing(const E& e, float (&scores)[E::SCORES][4], int count) {
#pragma unroll
    for (int j = 0; j < E::SCORES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (e.column(j, i) >= count) scores[j][i] = -INFINITY;
}

template <class E> DEV void forward_by_slices(typename E::T* out, float* lse, const typename E::T* qkv, const Attention& s) {
    E e;
    Share<E> at(s, 1);
    auto q = qkv_rows(qkv, s, at.pair, Q), k = qkv_rows(qkv, s, at.pair, K), v = qkv_rows(qkv, s, at.pair, V);
    float acc[E::RESULTS][4] = {}, scale = s.scale * LOG2_E;
    OnlineSoftmax<E::LANES> softmax;
    for (int key = 0; key < s.tokens; key += E::COLS) {
        float scores[E::SCORES][4] = {};
        e.product(scores, q, at.first, k, key, s);
        mask_passing(e, scores, s.tokens - key);
        softmax.step(scores, acc, scale);
        e.accumulate(acc, scores, v, key, at.channel, s);
    }
    softmax.finish();
    float inverse[2] = {1.0f / softmax.sum[0], 1.0f / softmax.sum[1]};
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int i = at.first + e.row(r);
        if (at.channel == 0 && threadIdx.x % E::LANES == 0 && i < s.tokens) lse[int64_t(at.pair) * s.tokens + i] = softmax.log_sum(r, scale);
    }
    store_slice(e, acc, inverse, out_rows(out, s, at.pair), at, s);
}

// kind 0: dq, rows are queries and keys pass; 1: dk, 2: dv, rows are keys and queries pass.
template <class E>
DEV void backward_by_slices(typename E::T* dqkv, const typename E::T* dout, const typename E::T* qkv, const float* lse, const float* delta, const Attention& s) {
    E e;
    Share<E> at(s, 3);
    auto a1 = qkv_rows(qkv, s, at.pair, at.kind == 0 ? Q : K), b1 = qkv_rows(qkv, s, at.pair, at.kind == 0 ? K : Q);
    auto a2 = out_rows(dout, s, at.pair), b2 = qkv_rows(qkv, s, at.pair, V);
    if (at.kind > 0) {
        auto v = b2;
        b2 = a2, a2 = v;
    }
    auto summed = b1;
    if (at.kind == 2) summed = b2;
    lse += int64_t(at.pair) * s.tokens, delta += int64_t(at.pair) * s.tokens;
    float acc[E::RESULTS][4] = {};
    for (int passing = 0; passing < s.tokens; passing += E::COLS) {
        float p[E::SCORES][4] = {}, ds[E::SCORES][4] = {};
        e.product(p, a1, at.first, b1, passing, s);
        mask_passing(e, p, s.tokens - passing);
        if (at.kind < 2) e.product(ds, a2, at.first, b2, passing, s);
#pragma unroll
        for (int j = 0; j < E::SCORES; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int query = min(at.kind == 0 ? at.first + e.row(i / 2) : passing + e.column(j, i), s.tokens - 1);
                p[j][i] = exp2_approx((p[j][i] * s.scale - lse[query]) * LOG2_E);
                if (at.kind < 2) p[j][i] *= ds[j][i] - delta[query];
            }
        e.accumulate(acc, p, summed, passing, at.channel, s);
    }
    float factor = at.kind < 2 ? s.scale : 1.0f, factors[2] = {factor, factor};
    store_slice(e, acc, factors, qkv_rows(dqkv, s, at.pair, at.kind == 0 ? Q : at.kind == 1 ? K : V), at, s);
}

#define ANY(NAME, ENGINE, T)                                                                                           \
    extern "C" __global__ void __launch_bounds__(ENGINE::THREADS, 2) attention_forward_##NAME(                        \
        T* __restrict__ out, float* __restrict__ lse, const T* __restrict__ qkv, const __grid_constant__ Attention s) { \
        forward_by_slices<ENGINE>(out, lse, qkv, s);                                                              \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(ENGINE::THREADS, 2) attention_backward_##NAME(                       \
        T* __restrict__ dqkv, const T* __restrict__ dout, const T* __restrict__ qkv, const float* __restrict__ lse,   \
        const float* __restrict__ delta, const __grid_constant__ Attention s) {                                       \
        backward_by_slices<ENGINE>(dqkv, dout, qkv, lse, delta, s);                                               \
    }
ANY(f32, F32Engine, float)
ANY(any, WideEngine, bf16)
