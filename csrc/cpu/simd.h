// Vectors in GCC's and Clang's portable notation, and the choice of an instruction set when a kernel is called: one
// binary runs everywhere, and a test can ask every instruction set for the same answer on one machine.
//
// A kernel is a struct with a static template `run<level>(…)`, marked WM_INLINE. `dispatch<Kernel>(…)` calls the copy
// of it that was compiled for `level()`. Helpers that take vectors must be WM_INLINE too: a call would pass them
// through memory, in a way that differs by instruction set, and would leave the instruction set of its caller. So must
// lambdas.
#pragma once

#include <cstdint>
#include <cstring>

#define WM_INLINE static inline __attribute__((always_inline))

namespace wmengine {

// Instruction sets by what they add; on processors other than x86-64 there is only the baseline.
enum class Level : int { kBaseline = 0, kV3 = 1, kV4 = 2 };  // SSE2 or NEON; AVX2 and FMA; AVX-512

// The best level that this processor has and set_level allows.
Level level();
Level best_level();
void set_level(Level level);  // std::invalid_argument where the processor lacks it

#if defined(__x86_64__)
#define WM_X86_64 1
template <typename Kernel, typename... Arguments>
__attribute__((target("arch=x86-64-v4"))) auto run_v4(Arguments... arguments) {
    return Kernel::template run<Level::kV4>(arguments...);
}
template <typename Kernel, typename... Arguments>
__attribute__((target("arch=x86-64-v3"))) auto run_v3(Arguments... arguments) {
    return Kernel::template run<Level::kV3>(arguments...);
}
#endif

// Arguments are passed by value: pointers, numbers, or small structs (a reference by std::ref is not needed so far).
template <typename Kernel, typename... Arguments>
auto dispatch(Arguments... arguments) {
#if defined(WM_X86_64)
    switch (level()) {
        case Level::kV4:
            return run_v4<Kernel>(arguments...);
        case Level::kV3:
            return run_v3<Kernel>(arguments...);
        case Level::kBaseline:
            break;
    }
#endif
    return Kernel::template run<Level::kBaseline>(arguments...);
}

// Lanes of the widest vector that a level computes with; the compiler splits vectors of eight where there is none.
constexpr int lanes_of(Level level) { return level == Level::kV4 ? 16 : 8; }

template <int lanes>
struct Vectors {
    typedef float Float __attribute__((vector_size(4 * lanes)));
    typedef uint32_t Word __attribute__((vector_size(4 * lanes)));
    typedef int32_t Int __attribute__((vector_size(4 * lanes)));
    typedef uint64_t Wide __attribute__((vector_size(4 * lanes)));  // half as many of 64 bits
};
template <int lanes>
using Floats = typename Vectors<lanes>::Float;
template <int lanes>
using Words32 = typename Vectors<lanes>::Word;
template <int lanes>
using Ints = typename Vectors<lanes>::Int;

typedef Floats<8> Float8;
typedef Ints<8> Int8;

template <typename Vector, typename T>
WM_INLINE Vector load(const T* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <typename Vector, typename T>
WM_INLINE void store(T* p, Vector v) {
    std::memcpy(p, &v, sizeof v);
}

template <int lanes>
WM_INLINE Floats<lanes> spread(float x) {
    float copies[lanes];  // compilers make one broadcast of this, and of other ways up to one a lane
    for (float& copy : copies) {
        copy = x;
    }
    return load<Floats<lanes>>(copies);
}

// 0, 1, 2, …
template <int lanes>
WM_INLINE Ints<lanes> iota() {
    Ints<lanes> result;
    for (int i = 0; i < lanes; ++i) {
        result[i] = i;
    }
    return result;
}

// x with its sign flipped where the top bit of `sign` is set.
template <typename Float, typename Word>
WM_INLINE Float flip(Float x, Word sign) {
    return (Float)((Word)x ^ (sign & 0x80000000u));
}

template <typename Vector>
WM_INLINE Vector minimum(Vector a, Vector b) {
    return a < b ? a : b;
}

template <typename Vector>
WM_INLINE Vector maximum(Vector a, Vector b) {
    return a > b ? a : b;
}

// v[order], of which only the low bits count.
template <typename Vector, typename Order>
WM_INLINE Vector permute(Vector v, Order order) {
#if defined(__clang__)
    constexpr int lanes = sizeof(Vector) / sizeof(v[0]);
    Vector result;
    for (int i = 0; i < lanes; ++i) {
        result[i] = v[order[i] & (lanes - 1)];
    }
    return result;
#else
    return __builtin_shuffle(v, order);
#endif
}

// The two halves of eight or sixteen lanes.
template <typename Vector>
WM_INLINE auto lower(Vector v) {
    if constexpr (sizeof v == 64) {
        return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
    } else {
        return __builtin_shufflevector(v, v, 0, 1, 2, 3);
    }
}
template <typename Vector>
WM_INLINE auto upper(Vector v) {
    if constexpr (sizeof v == 64) {
        return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    } else {
        return __builtin_shufflevector(v, v, 4, 5, 6, 7);
    }
}

// One number from all lanes, folded in halves: one fixed order, whatever the instruction set.
template <typename Vector, typename Fold>
WM_INLINE auto folded(Vector v, Fold fold) {
    if constexpr (sizeof v > 16) {
        return folded(fold(lower(v), upper(v)), fold);
    } else {
        v = fold(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
        return fold(v, __builtin_shufflevector(v, v, 1, 0, 3, 2))[0];
    }
}

template <typename Vector>
WM_INLINE auto sum_of(Vector v) {
    return folded(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}
template <typename Vector>
WM_INLINE auto maximum_of(Vector v) {
    return folded(v, [](auto a, auto b) __attribute__((always_inline)) { return maximum(a, b); });
}
template <typename Vector>
WM_INLINE auto minimum_of(Vector v) {
    return folded(v, [](auto a, auto b) __attribute__((always_inline)) { return minimum(a, b); });
}

}  // namespace wmengine
