// Convolution, 1x1 or 3x3, NHWC:  y[n,p,o] = bias[o] + shift[n,o] + residual[n,p,o] + Σ_{tap,c} x[n, p·stride + tap, c] w[o,tap,c]
//   x: (n, h, w, ca) and (n, h, w, cb), w: (oc, k, k, ca + cb) or, upsampling, folded to (oc, 4, 4, c): see src/ops/conv2d.rs.
// Also the linear layer (1x1 over images of one pixel). Compute bound; operands pass device memory once.
// Tiles, rows (pixels) by columns (channels): the launcher takes the largest that still gives every multiprocessor one.
#include "conv2d_gemm_bf16.cuh"
#include "conv2d_gemm_f32.cuh"

#define FORWARD(BM, BN, WARPS_M, WARPS_N, BLOCKS)                                                                     \
    extern "C" __global__ void __launch_bounds__(32 * WARPS_M * WARPS_N, BLOCKS) conv2d_forward_##BM##x##BN(          \
        const __grid_constant__ ConvGemm p) {                                                                         \
        conv_gemm_bf16<MmaTile<BM, BN, WARPS_M, WARPS_N>, false, false>(p);                                           \
    }
FORWARD(128, 128, 2, 2, 2)
FORWARD(128, 64, 2, 2, 3)
FORWARD(128, 32, 4, 1, 4)
FORWARD(64, 64, 2, 2, 4)
FORWARD(32, 64, 2, 2, 4)

// Any number of channels.
extern "C" __global__ void __launch_bounds__(128) conv2d_forward_any(const __grid_constant__ ConvGemm p) {
    conv_gemm_bf16<MmaTile<64, 64, 2, 2>, false, true>(p);
}
extern "C" __global__ void __launch_bounds__(F32_THREADS) conv2d_forward_f32(const __grid_constant__ ConvGemm p) {
    conv_gemm_f32<64, false>(p);
}
// At most 32 columns.
extern "C" __global__ void __launch_bounds__(F32_THREADS) conv2d_forward_f32_narrow(const __grid_constant__ ConvGemm p) {
    conv_gemm_f32<32, false>(p);
}
