// Vectors of eight floats, in GCC's and Clang's portable notation; functions marked WM_CLONES are compiled once for
// each instruction set and chosen when the module loads, so one binary runs everywhere.
//
// Helpers that take vectors must be WM_INLINE: a call would pass them through memory, in a way that differs by clone.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WM_CLONES
#endif
#define WM_INLINE static inline __attribute__((always_inline))

namespace wmengine {

typedef float Float8 __attribute__((vector_size(32)));
typedef uint32_t Word8 __attribute__((vector_size(32)));
typedef int32_t Int8 __attribute__((vector_size(32)));

WM_INLINE Float8 load8(const float* p) {
    Float8 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

WM_INLINE void store8(float* p, Float8 v) { std::memcpy(p, &v, sizeof v); }

WM_INLINE Word8 load_words(const uint32_t* p) {
    Word8 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

WM_INLINE Float8 splat(float x) { return Float8{x, x, x, x, x, x, x, x}; }

// x with its sign flipped where the top bit of `sign` is set.
WM_INLINE Float8 flip(Float8 x, Word8 sign) { return (Float8)((Word8)x ^ (sign & 0x80000000u)); }

WM_INLINE Float8 maximum(Float8 a, Float8 b) { return a > b ? a : b; }

// Eight lanes picked from a (0-7) and b (8-15).
#if defined(__clang__)
#define WM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define WM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, ::wmengine::Int8{__VA_ARGS__})
#endif

WM_INLINE Float8 permute8(Float8 v, Int8 order) {
#if defined(__clang__)
    Float8 result;
    for (int i = 0; i < 8; ++i) {
        result[i] = v[order[i] & 7];
    }
    return result;
#else
    return __builtin_shuffle(v, order);
#endif
}

// One fixed order, whatever the instruction set.
WM_INLINE float sum8(Float8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

WM_INLINE float maximum8(Float8 v) {
    float best = v[0];
    for (int i = 1; i < 8; ++i) {
        best = v[i] > best ? v[i] : best;
    }
    return best;
}

}  // namespace wmengine
