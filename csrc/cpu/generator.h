// The layout's random numbers, a block of weights at a time; written as loops over 32 lanes that compilers vectorise.
#pragma once

#include "layout.h"
#include "simd.h"

namespace wmengine {

// `count` counters (first + lane, c1, 0, domain) → words[4][count]; count is a compile-time multiple of 8.
template <int count>
WM_INLINE void draw_words(uint64_t first, uint32_t c1, uint32_t domain, uint64_t key, uint32_t (*words)[count]) {
    for (int begin = 0; begin < count; begin += 32) {
        constexpr int lanes = count < 32 ? count : 32;
        uint32_t a[lanes], b[lanes], c[lanes], d[lanes];
        for (int l = 0; l < lanes; ++l) {
            a[l] = static_cast<uint32_t>(first) + static_cast<uint32_t>(begin + l);
            b[l] = c1;
            c[l] = 0;
            d[l] = domain;
        }
        uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
        for (int round = 0; round < kPhiloxRounds; ++round) {
            for (int l = 0; l < lanes; ++l) {
                const uint64_t p0 = static_cast<uint64_t>(kPhiloxMultiplier0) * a[l];
                const uint64_t p1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c[l];
                a[l] = static_cast<uint32_t>(p1 >> 32) ^ b[l] ^ k0;
                c[l] = static_cast<uint32_t>(p0 >> 32) ^ d[l] ^ k1;
                b[l] = static_cast<uint32_t>(p1);
                d[l] = static_cast<uint32_t>(p0);
            }
            k0 += kPhiloxWeyl0;
            k1 += kPhiloxWeyl1;
        }
        std::memcpy(words[0] + begin, a, sizeof a);
        std::memcpy(words[1] + begin, b, sizeof b);
        std::memcpy(words[2] + begin, c, sizeof c);
        std::memcpy(words[3] + begin, d, sizeof d);
    }
}

// The signs of one block: words[i / 32][lane], bit i % 32 for row i.
WM_INLINE void block_signs(uint64_t block, uint32_t row, uint32_t domain, uint64_t key, uint32_t (*words)[kLanes]) {
    draw_words<kLanes>(block * kLanes, row, domain, key, words);
}

// Two standard normal values from each of a vector of word pairs (Box and Muller 1958); |z| <= 5.77. The logarithm of
// n · 2^-24, n in [1, 2^24], by atanh series on [sqrt(1/2), sqrt(2)), < 2 ulp; cosine and sine of a turn by its octant,
// in integers, then minimax polynomials on [-pi/4, pi/4].
template <int lanes>
WM_INLINE void box_muller_lanes(Words32<lanes> word0, Words32<lanes> word1, Floats<lanes>* first,
                                Floats<lanes>* second) {
    typedef Floats<lanes> Float;
    typedef Ints<lanes> Int;
    const auto to_float = [](Int x) __attribute__((always_inline)) { return __builtin_convertvector(x, Float); };
    const Words32<lanes> bits = (Words32<lanes>)to_float((Int)((word0 >> 8) + 1u)) - 0x3F3504F3u;
    const Float f = (Float)((bits & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
    const Float k = to_float(((Int)bits >> 23) - 24);
    const Float s = f / (2.0f + f), z = s * s;
    const Float series = z * (0.66666668f + z * (0.4000000f + z * (0.28571429f + z * (0.22222222f + z * 0.18181818f))));
    const Float logarithm = k * 0.693145752f + (k * 1.42860677e-06f + (2.0f * s + s * series));
    const Float square = -2.0f * logarithm;
    Float radius;
    for (int i = 0; i < lanes; ++i) {
        radius[i] = __builtin_sqrtf(square[i]);
    }
    const Words32<lanes> shifted = (word1 >> 8) + (1u << 21);  // bits 22 and 23: the quadrant
    const Float x = to_float((Int)(shifted & 0x3FFFFFu) - (1 << 21)) * (1.57079633f / 4194304.0f);
    const Float y = x * x;
    const Float sine = x + x * y * (-1.6666654611e-1f + y * (8.3321608736e-3f - y * 1.9515295891e-4f));
    const Float cosine =
        1.0f - 0.5f * y + y * y * (4.166664568298827e-2f + y * (-1.388731625493765e-3f + y * 2.443315711809948e-5f));
    const Int odd = (Int)(shifted << 9) < 0;
    *first = radius * flip(odd ? sine : cosine, (shifted + (1u << 22)) << 8);
    *second = radius * flip(odd ? cosine : sine, shifted << 8);
}

}  // namespace wmengine
