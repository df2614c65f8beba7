// float32, float16 and bfloat16 in memory, read and written as vectors of float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace wmengine {

enum class Stored : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

WM_INLINE float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

WM_INLINE uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

template <int lanes>
struct Halves {
    typedef uint16_t Type __attribute__((vector_size(2 * lanes)));
};

// How numbers lie in memory: widened to float32 when read, rounded to the nearest when written, ties to even. Two
// vectors at a time may be read in any order that writing them undoes. A NaN that is written has no payload.
struct Float32 {
    typedef float Type;

    template <Level level, int lanes>
    WM_INLINE Floats<lanes> read(const float* p) {
        return load<Floats<lanes>>(p);
    }

    template <Level level, int lanes>
    WM_INLINE void read_two(const float* p, Floats<lanes>& a, Floats<lanes>& b) {
        a = load<Floats<lanes>>(p);
        b = load<Floats<lanes>>(p + lanes);
    }

    template <Level level>
    WM_INLINE float read_one(const float* p) {
        return *p;
    }

    template <Level level, int lanes>
    WM_INLINE void write(float* p, Floats<lanes> v) {
        store(p, v);
    }

    template <Level level, int lanes>
    WM_INLINE void write_two(float* p, Floats<lanes> a, Floats<lanes> b) {
        store(p, a);
        store(p + lanes, b);
    }

    template <Level level>
    WM_INLINE void write_one(float* p, float x) {
        *p = x;
    }
};

struct Bfloat16 {
    typedef uint16_t Type;

    template <typename Word>
    WM_INLINE Word rounded(Word bits) {
        return bits + 0x7FFF + ((bits >> 16) & 1);
    }

    template <Level level, int lanes>
    WM_INLINE Floats<lanes> read(const uint16_t* p) {
        return (Floats<lanes>)(__builtin_convertvector(load<typename Halves<lanes>::Type>(p), Words32<lanes>) << 16);
    }

    template <Level level, int lanes>
    WM_INLINE void read_two(const uint16_t* p, Floats<lanes>& a, Floats<lanes>& b) {
        const Words32<lanes> pairs = load<Words32<lanes>>(p);
        a = (Floats<lanes>)(pairs << 16);
        b = (Floats<lanes>)(pairs & 0xFFFF0000);
    }

    template <Level level>
    WM_INLINE float read_one(const uint16_t* p) {
        return from_bits(uint32_t{*p} << 16);
    }

    template <Level level, int lanes>
    WM_INLINE void write(uint16_t* p, Floats<lanes> v) {
        store(p, __builtin_convertvector(rounded((Words32<lanes>)v) >> 16, typename Halves<lanes>::Type));
    }

    template <Level level, int lanes>
    WM_INLINE void write_two(uint16_t* p, Floats<lanes> a, Floats<lanes> b) {
        typedef Words32<lanes> Word;
        store(p, (rounded((Word)a) >> 16) | (rounded((Word)b) & 0xFFFF0000));
    }

    template <Level level>
    WM_INLINE void write_one(uint16_t* p, float x) {
        *p = static_cast<uint16_t>(rounded(to_bits(x)) >> 16);
    }
};

struct Float16 {
    typedef uint16_t Type;

    template <Level level, int lanes>
    WM_INLINE Floats<lanes> widened(typename Halves<lanes>::Type half) {
        typedef Words32<lanes> Word;
#if defined(WM_X86_64) && !defined(__clang__)
        if constexpr (level != Level::kBaseline) {
            Floats<lanes> wide;
            asm("vcvtph2ps %1, %0" : "=v"(wide) : "v"(half));
            return wide;
        }
#endif
        const Word bits = __builtin_convertvector(half, Word);
        const Word magnitude = (bits & 0x7FFF) << 13;
        const Word number = (Word)((Floats<lanes>)magnitude * spread<lanes>(0x1p112f));  // subnormals come out right
        const Word beyond = (Word)(magnitude >= 0x0F800000) & 0x7F800000;                // infinities and NaNs
        return (Floats<lanes>)(number | beyond | (bits & 0x8000) << 16);
    }

    template <Level level, int lanes>
    WM_INLINE typename Halves<lanes>::Type narrowed(Floats<lanes> v) {
        typedef Words32<lanes> Word;
        typedef typename Halves<lanes>::Type Half;
#if defined(WM_X86_64) && !defined(__clang__)
        if constexpr (level != Level::kBaseline) {
            Half narrow;
            asm("vcvtps2ph $0, %1, %0" : "=v"(narrow) : "v"(v));
            return narrow;
        }
#endif
        const Word magnitude = (Word)v & 0x7FFFFFFF;
        const Word normal = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
        const Word subnormal = (Word)((Floats<lanes>)magnitude + spread<lanes>(0.5f)) - 0x3F000000;
        const Word finite = magnitude < 0x38800000 ? subnormal : normal;
        const Word infinite = Word{} + 0x7C00, nan = Word{} + 0x7E00;
        const Word beyond = magnitude > 0x7F800000 ? nan : infinite;
        const Word bits = (magnitude < 0x47800000 ? finite : beyond) | ((Word)v >> 16 & 0x8000);
        return __builtin_convertvector(bits, Half);
    }

    template <Level level, int lanes>
    WM_INLINE Floats<lanes> read(const uint16_t* p) {
        return widened<level, lanes>(load<typename Halves<lanes>::Type>(p));
    }

    template <Level level, int lanes>
    WM_INLINE void read_two(const uint16_t* p, Floats<lanes>& a, Floats<lanes>& b) {
        a = read<level, lanes>(p);
        b = read<level, lanes>(p + lanes);
    }

    template <Level level>
    WM_INLINE float read_one(const uint16_t* p) {
        return widened<level, 8>(Halves<8>::Type{} + *p)[0];
    }

    template <Level level, int lanes>
    WM_INLINE void write(uint16_t* p, Floats<lanes> v) {
        store(p, narrowed<level, lanes>(v));
    }

    template <Level level, int lanes>
    WM_INLINE void write_two(uint16_t* p, Floats<lanes> a, Floats<lanes> b) {
        write<level, lanes>(p, a);
        write<level, lanes>(p + lanes, b);
    }

    template <Level level>
    WM_INLINE void write_one(uint16_t* p, float x) {
        *p = narrowed<level, 8>(spread<8>(x))[0];
    }
};

// The last vector of `count` > 0 numbers ends with them. Where they are fewer than its lanes it passes through memory
// of our own, and its first lanes hold nothing; where they are more it overlaps the vector before.
template <typename Memory, Level level, int lanes>
WM_INLINE Floats<lanes> read_last(const typename Memory::Type* z, int64_t count) {
    if (count >= lanes) {
        return Memory::template read<level, lanes>(z + count - lanes);
    }
    typename Memory::Type end[lanes] = {};
    for (int64_t i = 0; i < count; ++i) {
        end[lanes - count + i] = z[i];
    }
    return Memory::template read<level, lanes>(end);
}

template <typename Memory, Level level, int lanes>
WM_INLINE void write_last(typename Memory::Type* g, int64_t count, Floats<lanes> v) {
    if (count >= lanes) {
        Memory::template write<level, lanes>(g + count - lanes, v);
        return;
    }
    typename Memory::Type end[lanes];
    Memory::template write<level, lanes>(end, v);
    for (int64_t i = 0; i < count; ++i) {
        g[i] = end[lanes - count + i];
    }
}

// Calls f(Memory{}) for the type that numbers have in memory.
template <typename F>
void with_memory(Stored stored, F f) {
    switch (stored) {
        case Stored::kFloat32:
            return f(Float32{});
        case Stored::kFloat16:
            return f(Float16{});
        case Stored::kBfloat16:
            return f(Bfloat16{});
    }
}

}  // namespace wmengine
