// What every kernel includes first. Under nvcc it is CUDA; in the emulated build the same words come from emu/cuda_emu.h.
//
//   SMEM(float, tile, [32][33]);      a static shared array. Never bare __shared__: the emulator fills, fences and checks it.
//   SMEM_DYN(smem);                   the dynamic shared memory of the launch, carved in order:
//   bf16* a = smem.take<bf16>(n);     n elements, 128-byte aligned (take<T>(n, 1024) for TMA tiles)
//   Vec<bf16, 8> v = *p;              one 16-byte access
#pragma once

#ifdef IDDPM_EMULATOR
#include "emu/cuda_emu.h"
#else
#include <cuda.h>
#include <cuda_bf16.h>
#include <stdint.h>

#define SMEM(T, name, dims) __shared__ __align__(16) T name dims
extern __shared__ __align__(1024) char dynamic_shared[];
struct DynamicShared {
    uint32_t used = 0;  // an offset, not a pointer: so the compiler knows all that is taken for shared memory
    template <class T> __device__ __forceinline__ T* take(size_t n, uint32_t align = 128) {
        uint32_t at = (used + align - 1) / align * align;
        used = at + uint32_t(n * sizeof(T));
        return reinterpret_cast<T*>(dynamic_shared + at);
    }
};
#define SMEM_DYN(name) DynamicShared name
#define VECTOR_ACCESS(Type) Type() = default;
#endif

#define DEV __device__ __forceinline__
#define FULL_MASK 0xffffffffu

typedef __nv_bfloat16 bf16;
typedef __nv_bfloat162 bf162;

// N neighbouring elements that load and store as one access; the address must be a multiple of the whole.
template <class T, int N> struct alignas(sizeof(T) * N) Vec {
    T v[N];
    VECTOR_ACCESS(Vec)
    DEV T& operator[](int i) { return v[i]; }
    DEV const T& operator[](int i) const { return v[i]; }
};

DEV float to_float(float x) { return x; }
DEV float to_float(bf16 x) { return __bfloat162float(x); }
template <class T> DEV T from_float(float x);
template <> DEV float from_float<float>(float x) { return x; }
template <> DEV bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

// Is p a multiple of 16 bytes?
DEV bool aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }
