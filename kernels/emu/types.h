// CUDA's vector types and bf16 as host C++.
//
// A vector type loads and stores as one access. The compiler would split `float4 v = *p` into four 4-byte loads before the
// checks are inserted, and the meter would then see four strided accesses; so these types copy through emu::copy.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#define EMU_ASAN 1
#endif
#if defined(__SANITIZE_THREAD__) && !defined(EMU_TSAN)
#define EMU_CHECKED 1  // -fsanitize=thread inserts calls, and memory.cpp answers them
#endif
#define EMU_NOCHECK __attribute__((no_sanitize("thread")))

namespace emu {
void copy(void* dst, const void* src, size_t bytes, const void* pc);  // one checked read, one checked write
}

#ifdef EMU_CHECKED
#define VECTOR_ACCESS(Type)                                                                \
    Type() = default;                                                                      \
    __attribute__((noinline)) EMU_NOCHECK Type(const Type& other) {                        \
        emu::copy(this, &other, sizeof(Type), __builtin_return_address(0));                \
    }                                                                                      \
    __attribute__((noinline)) EMU_NOCHECK Type& operator=(const Type& other) {             \
        emu::copy(this, &other, sizeof(Type), __builtin_return_address(0));                \
        return *this;                                                                      \
    }
#else
#define VECTOR_ACCESS(Type) Type() = default;
#endif

#define EMU_VECTORS(T, Name1, Name2, Name3, Name4)                                         \
    struct Name1 { T x; };                                                                 \
    struct Name3 { T x, y, z; };                                                           \
    struct alignas(2 * sizeof(T)) Name2 {                                                  \
        T x, y;                                                                            \
        VECTOR_ACCESS(Name2)                                                               \
        Name2(T a, T b) : x(a), y(b) {}                                                    \
    };                                                                                     \
    struct alignas(sizeof(T) * 4 > 16 ? 16 : sizeof(T) * 4) Name4 {                        \
        T x, y, z, w;                                                                      \
        VECTOR_ACCESS(Name4)                                                               \
        Name4(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}                              \
    };                                                                                     \
    inline Name2 make_##Name2(T a, T b) { return Name2(a, b); }                            \
    inline Name3 make_##Name3(T a, T b, T c) { return Name3{a, b, c}; }                    \
    inline Name4 make_##Name4(T a, T b, T c, T d) { return Name4(a, b, c, d); }
EMU_VECTORS(float, float1, float2, float3, float4)
EMU_VECTORS(int, int1, int2, int3, int4)
EMU_VECTORS(unsigned, uint1, uint2, uint3, uint4)
EMU_VECTORS(unsigned short, ushort1, ushort2, ushort3, ushort4)
EMU_VECTORS(unsigned char, uchar1, uchar2, uchar3, uchar4)
EMU_VECTORS(long long, longlong1, longlong2, longlong3, longlong4)
EMU_VECTORS(unsigned long long, ulonglong1, ulonglong2, ulonglong3, ulonglong4)
EMU_VECTORS(double, double1, double2, double3, double4)
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

template <class To, class From> inline To emu_bits(From f) {
    static_assert(sizeof(To) == sizeof(From));
    To t;
    memcpy(&t, &f, sizeof t);
    return t;
}

// ---- bf16: the upper half of a float, rounded to nearest even; NaN becomes 0x7fff as on the device ----
struct __nv_bfloat16 { uint16_t x; };
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
    VECTOR_ACCESS(__nv_bfloat162)
    __nv_bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) : x(a), y(b) {}
};
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;
inline float __bfloat162float(__nv_bfloat16 b) { return emu_bits<float>(uint32_t(b.x) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
    uint32_t u = emu_bits<uint32_t>(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float f) { return __float2bfloat16_rn(f); }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
    return __nv_bfloat162(__float2bfloat16_rn(a), __float2bfloat16_rn(b));
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 a) { return __floats2bfloat162_rn(a.x, a.y); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return float2(__bfloat162float(v.x), __bfloat162float(v.y)); }
inline float __low2float(__nv_bfloat162 v) { return __bfloat162float(v.x); }
inline float __high2float(__nv_bfloat162 v) { return __bfloat162float(v.y); }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 b) { return b.x; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t u) { return {u}; }
