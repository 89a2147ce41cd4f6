// CUDA C++ as host C++: the keywords, built-in variables and intrinsics that the kernels use. common.cuh includes it when
// IDDPM_EMULATOR is defined. One CUDA thread is one fiber; see runtime.h for what stands behind the functions declared here.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "types.h"

// ---- keywords (after every standard header: libstdc++ uses some of these names itself) ----
#ifndef IDDPM_EMULATOR_SCAN  // build.rs looks for these two in the preprocessed text
#define __global__ __attribute__((noinline))
#define __launch_bounds__(...)
#endif
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __grid_constant__
#define __align__(n) alignas(n)
#define __shared__ static_assert(false, "use SMEM(type, name, [size]) or SMEM_DYN(name), not __shared__");

namespace emu {
// ---- what a launch needs to know of a kernel ----
struct Param {
    uint32_t size;
    char kind;  // 'p' pointer, 'i' integer, 'f' floating point, 's' struct
};
struct Kernel {
    const char* name;
    void (*call)(void* const* args);
    const Param* params;
    uint32_t param_count, max_threads;
};
template <class T> constexpr Param describe_param() {
    return {uint32_t(sizeof(T)), std::is_pointer_v<T> ? 'p' : std::is_integral_v<T> ? 'i' : std::is_floating_point_v<T> ? 'f' : 's'};
}
template <auto K> struct Caller;
template <class... A, void (*K)(A...)> struct Caller<K> {
    static constexpr Param params[sizeof...(A) + 1] = {describe_param<A>()..., {0, 0}};
    template <size_t... I> EMU_NOCHECK static void apply(void* const* a, std::index_sequence<I...>) {
        K(*static_cast<A*>(a[I])...);
    }
    EMU_NOCHECK static void call(void* const* a) { apply(a, std::index_sequence_for<A...>{}); }
    static constexpr Kernel describe(const char* name, uint32_t max_threads) {
        return {name, call, params, sizeof...(A), max_threads};
    }
};

// ---- the running thread; constant over its life, so the compiler may keep them ----
uint3 thread_index() __attribute__((const));
uint3 block_index() __attribute__((const));
uint3 block_dim() __attribute__((const));
uint3 grid_dim() __attribute__((const));
unsigned lane() __attribute__((const));

// ---- waiting for each other ----
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void yield();
void fence();
int barrier(unsigned id, unsigned threads, const char* file, int line, bool wait, int vote);  // threads 0: the block
void collective(uint32_t mask, int op, void* mine, void (*last)(void** lanes, uint32_t mask));
void sync_warp(uint32_t mask);
uint64_t shuffle(uint32_t mask, uint64_t bits, int source);

// ---- shared memory ----
void* shared_array(const void* key, size_t bytes, size_t align);
struct DynamicShared {
    size_t used = 0, real = 0;
    void* take_bytes(size_t bytes, size_t align);
    template <class T> T* take(size_t n, size_t align = 128) { return static_cast<T*>(take_bytes(n * sizeof(T), align)); }
};
uint32_t shared_address(const void* p);

enum { OP_SHUFFLE = 1, OP_REDUCE, OP_SYNC, OP_LDMATRIX, OP_LDMATRIX_TRANS, OP_MMA_BF16, OP_MMA_TF32 };
template <class T, class F> inline T reduce(uint32_t mask, T v, F) {
    static_assert(std::is_integral_v<T>, "reductions over a warp are for integers");
    collective(mask, OP_REDUCE, &v, [](void** a, uint32_t m) EMU_NOCHECK {
        T acc = *static_cast<T*>(a[__builtin_ctz(m)]);
        for (uint32_t r = m & (m - 1); r; r &= r - 1) acc = F{}(acc, *static_cast<T*>(a[__builtin_ctz(r)]));
        for (uint32_t r = m; r; r &= r - 1) *static_cast<T*>(a[__builtin_ctz(r)]) = acc;
    });
    return v;
}
template <class T> inline T shuffle_value(uint32_t mask, T v, int source) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    uint64_t bits = 0;
    memcpy(&bits, &v, sizeof v);
    bits = shuffle(mask, bits, source);
    memcpy(&v, &bits, sizeof v);
    return v;
}
struct Add { template <class T> T operator()(T a, T b) const { return T(a + b); } };
struct Max { template <class T> T operator()(T a, T b) const { return a > b ? a : b; } };
struct Min { template <class T> T operator()(T a, T b) const { return a < b ? a : b; } };
struct And { template <class T> T operator()(T a, T b) const { return a & b; } };
struct Or { template <class T> T operator()(T a, T b) const { return a | b; } };
}  // namespace emu

// EMU_KERNEL(name, threads): the descriptor that the launcher finds by the symbol emu_kernel_name.
#define EMU_KERNEL(name, threads)                                                                     \
    extern "C" {                                                                                      \
    extern const emu::Kernel emu_kernel_##name;                                                       \
    const emu::Kernel emu_kernel_##name = emu::Caller<&name>::describe(#name, threads);               \
    }

#define threadIdx (emu::thread_index())
#define blockIdx (emu::block_index())
#define blockDim (emu::block_dim())
#define gridDim (emu::grid_dim())
#define warpSize 32

#define SMEM(T, name, dims)                    \
    static char name##_key;                    \
    typedef T name##_type dims;                \
    name##_type& name = *static_cast<name##_type*>(emu::shared_array(&name##_key, sizeof(name##_type), alignof(T) < 16 ? 16 : alignof(T)))
#define SMEM_DYN(name) emu::DynamicShared name

// ---- barriers and warp intrinsics ----
#define __syncthreads() ((void)emu::barrier(0, 0, __FILE__, __LINE__, true, 0))
#define __syncthreads_count(p) (emu::barrier(0, 0, __FILE__, __LINE__, true, (p) != 0))
#define __syncthreads_or(p) (emu::barrier(0, 0, __FILE__, __LINE__, true, (p) != 0) != 0)
#define __syncthreads_and(p) (emu::barrier(0, 0, __FILE__, __LINE__, true, (p) == 0) == 0)
inline void __syncwarp(unsigned mask = 0xffffffffu) { emu::sync_warp(mask); }
template <class T> inline T __shfl_sync(unsigned m, T v, int source, int width = 32) {
    int l = int(emu::lane());
    return emu::shuffle_value(m, v, (l & ~(width - 1)) | (source & (width - 1)));
}
template <class T> inline T __shfl_xor_sync(unsigned m, T v, int x, int width = 32) {
    int l = int(emu::lane()), s = l ^ x;
    return emu::shuffle_value(m, v, s < (l & ~(width - 1)) + width ? s : l);
}
template <class T> inline T __shfl_up_sync(unsigned m, T v, unsigned d, int width = 32) {
    int l = int(emu::lane()), s = l - int(d);
    return emu::shuffle_value(m, v, s >= (l & ~(width - 1)) ? s : l);
}
template <class T> inline T __shfl_down_sync(unsigned m, T v, unsigned d, int width = 32) {
    int l = int(emu::lane()), s = l + int(d);
    return emu::shuffle_value(m, v, s < (l & ~(width - 1)) + width ? s : l);
}
inline unsigned __ballot_sync(unsigned m, int p) { return emu::reduce(m, p ? 1u << emu::lane() : 0u, emu::Or{}); }
inline int __any_sync(unsigned m, int p) { return __ballot_sync(m, p) != 0; }
inline int __all_sync(unsigned m, int p) { return __ballot_sync(m, !p) == 0; }
template <class T> inline T __reduce_add_sync(unsigned m, T v) { return emu::reduce(m, v, emu::Add{}); }
template <class T> inline T __reduce_max_sync(unsigned m, T v) { return emu::reduce(m, v, emu::Max{}); }
template <class T> inline T __reduce_min_sync(unsigned m, T v) { return emu::reduce(m, v, emu::Min{}); }

// ---- memory, integer atomics, fences. Sums of floats are never atomic here: their order would change the bits ----
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, const T& v) { *p = v; }
template <class T> inline void __stcg(T* p, const T& v) { *p = v; }
inline void __threadfence() { emu::fence(); }
inline void __threadfence_block() {}
template <class T> using EmuInteger = std::enable_if_t<std::is_integral_v<T>, T>;
template <class T> inline EmuInteger<T> atomicAdd(T* p, std::type_identity_t<T> v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
template <class T> inline EmuInteger<T> atomicOr(T* p, std::type_identity_t<T> v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }
template <class T> inline EmuInteger<T> atomicExch(T* p, std::type_identity_t<T> v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }
template <class T> inline EmuInteger<T> atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}
template <class T> inline EmuInteger<T> atomicMax(T* p, std::type_identity_t<T> v) {
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (old < v && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}
template <class T> inline EmuInteger<T> atomicMin(T* p, std::type_identity_t<T> v) {
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (old > v && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}

// ---- mathematics. The fast forms are off by as much as NVIDIA's manual allows, up or down as the bits of the result happen to
// ---- be: a bound that holds here holds on a device ----
namespace emu {
inline float off_by(float ulp, float x) {
    unsigned bits = emu_bits<unsigned>(x);
    float unit = emu_bits<float>(bits & 0x7f800000u) * 0x1p-23f;
    return std::isfinite(x) ? x + (bits * 0x9E3779B9u >> 31 ? ulp : -ulp) * unit : x;
}
}  // namespace emu
using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return emu::off_by(2 + floorf(fabsf(1.173f * x)), expf(x)); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
// A divisor beyond 2^126 gives 0.
inline float __fdividef(float a, float b) { return fabsf(b) > 0x1p126f ? a * 0.0f : emu::off_by(2, a / b); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
// A product that no sum is fused with.
template <class T> inline T emu_product(T x) {
    asm volatile("" : "+m"(x));
    return x;
}
inline float __fmul_rn(float a, float b) { return emu_product(a * b); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline double __dmul_rn(double a, double b) { return emu_product(a * b); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
inline void __sincosf(float x, float* s, float* c) { *s = sinf(x); *c = cosf(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline unsigned __float_as_uint(float f) { return emu_bits<unsigned>(f); }
inline int __float_as_int(float f) { return emu_bits<int>(f); }
inline float __uint_as_float(unsigned u) { return emu_bits<float>(u); }
inline float __int_as_float(int u) { return emu_bits<float>(u); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __float2int_rn(float x) { return int(nearbyintf(x)); }
inline int __float2int_rz(float x) { return int(x); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned select) {
    uint64_t v = uint64_t(b) << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) r |= unsigned(v >> (8 * (select >> (4 * i) & 7)) & 255) << (8 * i);
    return r;
}
inline void __trap() { emu::fail("__trap()"); }
inline void __nanosleep(unsigned) { emu::yield(); }
