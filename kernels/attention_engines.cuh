// Products of the attention for heads of any width: 64 or 128 channels of the result at a time, everything else repeated for each.
//
// An engine is a block that holds ROWS resident tokens against COLS passing ones. A lane has two rows; scores and results lie in quads of
// two rows by two columns, LANES lanes share a row. `product`: s += a b^T over all channels; `accumulate`: acc += s · (a slice of b).
#pragma once
#include "attention.cuh"

// f32 by plain multiply-adds: the twin of all others.
struct F32Engine {
    typedef float T;
    static constexpr int ROWS = 32, COLS = 32, SLICE = 64, THREADS = 128, LANES = 8, SCORES = 2, RESULTS = 4;
    static constexpr int CHUNK = 32, PITCH = CHUNK + 1;
    float *left, *right;  // channels of a and of b; or weights and a slice of b

    DEV F32Engine() {
        SMEM(float, a, [ROWS * PITCH]);
        SMEM(float, b, [COLS * (SLICE + 1)]);
        left = a, right = b;
    }
    DEV int row(int r) const { return threadIdx.x / LANES * 2 + r; }
    DEV int column(int j, int e) const { return threadIdx.x % LANES + LANES * (2 * j + e % 2); }

    template <int WIDTH> DEV void load(float* tile, const HeadRows<const float>& from, int first, int channel, const Attention& s) const {
        for (int id = threadIdx.x; id < 32 * WIDTH; id += THREADS) {
            int r = id / WIDTH, c = id % WIDTH;
            tile[r * (WIDTH + 1) + c] = first + r < s.tokens && channel + c < s.d ? from.row(first + r)[channel + c] : 0.0f;
        }
    }
    DEV void product(float (&sum)[SCORES][4], const HeadRows<const float>& a, int a0, const HeadRows<const float>& b, int b0,
                     const Attention& s) const {
        for (int channel = 0; channel < s.d; channel += CHUNK) {
            __syncthreads();  // all have done with the last tiles
            load<CHUNK>(left, a, a0, channel, s);
            load<CHUNK>(right, b, b0, channel, s);
            __syncthreads();
            for (int c = 0; c < min(CHUNK, s.d - channel); c++) {
                float x[2] = {left[row(0) * PITCH + c], left[row(1) * PITCH + c]};
#pragma unroll
                for (int i = 0; i < 2 * SCORES; i++) {
                    float y = right[column(i / 2, i % 2) * PITCH + c];
#pragma unroll
                    for (int r = 0; r < 2; r++) sum[i / 2][2 * r + i % 2] = __fmaf_rn(x[r], y, sum[i / 2][2 * r + i % 2]);
                }
            }
        }
    }
    DEV void accumulate(float (&acc)[RESULTS][4], const float (&w)[SCORES][4], const HeadRows<const float>& b, int b0, int channel,
                        const Attention& s) const {
        __syncthreads();
        load<SLICE>(right, b, b0, channel, s);
#pragma unroll
        for (int j = 0; j < SCORES; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) left[row(e / 2) * PITCH + column(j, e)] = w[j][e];
        __syncthreads();
        for (int i = 0; i < min(COLS, s.tokens - b0); i++) {
            float x[2] = {left[row(0) * PITCH + i], left[row(1) * PITCH + i]};
#pragma unroll
            for (int j = 0; j < RESULTS; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) acc[j][e] = __fmaf_rn(x[e / 2], right[i * (SLICE + 1) + column(j, e)], acc[j][e]);
        }
    }
};

// bf16 by tensor cores: 64 channels of the scores' product at a time.
struct WideEngine {
    typedef bf16 T;
    static constexpr int ROWS = 64, COLS = 32, SLICE = 128, THREADS = 128, LANES = 4, SCORES = COLS / 8, RESULTS = SLICE / 8;
    static constexpr int CHUNK = 64;
    bf16 *left, *right, *slice;

    DEV WideEngine() {
        SMEM(bf16, tiles, [(ROWS + COLS) * CHUNK + COLS * SLICE]);
        left = tiles, right = left + ROWS * CHUNK, slice = right + COLS * CHUNK;
    }
    DEV int row(int r) const { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * r; }
    DEV int column(int j, int e) const { return 8 * j + threadIdx.x % 4 * 2 + e % 2; }

    // Copies of 16 bytes where the width allows them, else element by element.
    template <int COUNT, int WIDTH> DEV void load(bf16* tile, const HeadRows<const bf16>& from, int first, int channel, const Attention& s) const {
        HeadRows<const bf16> shifted{from.p + channel, from.stride};
        if (s.d % 8 == 0) return copy_rows<COUNT, WIDTH, THREADS>(tile, shifted, first, s.tokens, s.d - channel, threadIdx.x);
        for (int id = threadIdx.x; id < COUNT * WIDTH; id += THREADS) {
            int r = id / WIDTH, c = id % WIDTH;
            bool ok = first + r < s.tokens && channel + c < s.d;
            tile[slot<WIDTH / 8>(r, c / 8) + c % 8] = ok ? shifted.row(first + r)[c] : from_float<bf16>(0.0f);
        }
    }
    DEV void product(float (&sum)[SCORES][4], const HeadRows<const bf16>& a, int a0, const HeadRows<const bf16>& b, int b0,
                     const Attention& s) const {
        for (int channel = 0; channel < s.d; channel += CHUNK) {
            __syncthreads();  // all have done with the last tiles
            load<ROWS, CHUNK>(left, a, a0, channel, s);
            load<COLS, CHUNK>(right, b, b0, channel, s);
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads();
            rows_by_rows<CHUNK, COLS, true>(sum, left + threadIdx.x / 32 * 16 * CHUNK, right);
        }
    }
    DEV void accumulate(float (&acc)[RESULTS][4], const float (&w)[SCORES][4], const HeadRows<const bf16>& b, int b0, int channel,
                        const Attention& s) const {
        __syncthreads();
        load<COLS, SLICE>(slice, b, b0, channel, s);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        weighted_rows<SLICE, COLS>(acc, Weights<COLS>(w), slice);
    }
};
