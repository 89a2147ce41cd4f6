// What the convolution kernels share: where operands lie, which pixels a tap joins, how shared memory is laid out.
//
// Every direction is one implicit GEMM whose rows are pixels of a grid (n, gh, gw); tap t joins pixel (i, j) of the grid with
// pixel (i·step + dy, j·step + dx) of the gathered image, which reads as 0 outside. A table of taps (src/ops/conv2d/geometry.rs)
// says the rest, so that stride 2 and the fourfold form of upsampling need no code of their own.
#pragma once
#include "common.cuh"

constexpr int MAX_TAPS = 16;

// n / divisor for 0 <= n < 2^31 by a multiplication.
struct FastDiv {
    uint32_t divisor, factor, shift;
    DEV int div(int n) const { return int((__umulhi(uint32_t(n), factor) + uint32_t(n)) >> shift); }
    DEV int mod(int n) const { return n - div(n) * int(divisor); }
};

// Rows of 16-byte chunks in shared memory, permuted so that neither a row of copies nor the eight rows of an ldmatrix meet in
// a bank: a row of 64 bytes takes half the banks, so pairs of rows share a permutation; longer rows take all of them.
template <int CHUNKS> DEV int swizzled(int row, int chunk) {
    return (row * CHUNKS + (CHUNKS == 4 ? chunk ^ (row >> 1 & 3) : chunk ^ (row & 7))) * 8;
}

// f32 tile of the epilogue: fragments are written two columns at a time by 4 x 4 lanes and read four at a time along rows.
DEV int staged(int row, int col, int width) { return row * width + (col ^ (row & 3) << 3); }

DEV bool inside(int y, int x, int h, int w) { return unsigned(y) < unsigned(h) && unsigned(x) < unsigned(w); }

// Eight elements as one 16-byte store.
DEV void store_chunk(bf16* to, const bf16 (&v)[8]) {
    Vec<bf16, 8> chunk;
#pragma unroll
    for (int e = 0; e < 8; e++) chunk[e] = v[e];
    *reinterpret_cast<Vec<bf16, 8>*>(to) = chunk;
}
