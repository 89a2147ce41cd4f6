// Gradient of a convolution with respect to its input:  dx = convᵀ(dy, w) + add, written to the two tensors x came from.
//   dy: (n, oh, ow, oc), w: (oc, k, k, c) or folded (oc, 4, 4, c), dx, add: (n, h, w, ca) and (n, h, w, cb).
// The forward GEMM with the weights read transposed. Stride 2 is four phases of 4, 2, 2 and 1 taps; the gradient of an upsampling
// convolution gathers 4 x 4 pixels of dy, two apart, under the folded weights.
#include "conv2d_gemm_bf16.cuh"
#include "conv2d_gemm_f32.cuh"

#define BACKWARD(BM, BN, WARPS_M, WARPS_N, BLOCKS)                                                                    \
    extern "C" __global__ void __launch_bounds__(32 * WARPS_M * WARPS_N, BLOCKS) conv2d_backward_data_##BM##x##BN(    \
        const __grid_constant__ ConvGemm p) {                                                                         \
        conv_gemm_bf16<MmaTile<BM, BN, WARPS_M, WARPS_N>, true, false>(p);                                            \
    }
BACKWARD(128, 128, 2, 2, 2)
BACKWARD(128, 64, 2, 2, 3)
BACKWARD(128, 32, 4, 1, 4)
BACKWARD(64, 64, 2, 2, 4)
BACKWARD(32, 64, 2, 2, 4)

// Any number of channels.
extern "C" __global__ void __launch_bounds__(128) conv2d_backward_data_any(const __grid_constant__ ConvGemm p) {
    conv_gemm_bf16<MmaTile<64, 64, 2, 2>, true, true>(p);
}
extern "C" __global__ void __launch_bounds__(F32_THREADS, 8) conv2d_backward_data_f32(const __grid_constant__ ConvGemm p) {
    conv_gemm_f32<64, true>(p);
}
// At most 32 columns.
extern "C" __global__ void __launch_bounds__(F32_THREADS) conv2d_backward_data_f32_narrow(const __grid_constant__ ConvGemm p) {
    conv_gemm_f32<32, true>(p);
}
