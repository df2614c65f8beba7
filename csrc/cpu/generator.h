// The layout's random numbers, a block of weights at a time; written as loops over 32 lanes that compilers vectorise.
#pragma once

#include "../common/layout.h"
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

// Row i's sign of eight lanes, in the top bit.
WM_INLINE Word8 row_signs(const uint32_t (*words)[kLanes], int i, int lane) {
    return load_words(words[i >> 5] + lane) << static_cast<uint32_t>(31 - (i & 31));
}

// 128 Gaussian values of a dense row: weights 128 * group ….
WM_INLINE void gaussian_group(uint64_t group, uint32_t row, uint64_t key, float* values) {
    uint32_t words[4][kLanes];
    draw_words<kLanes>(group * kLanes, row, kDomainGaussian, key, words);
    for (int l = 0; l < kLanes; ++l) {
        box_muller(words[0][l], words[1][l], values + l, values + kLanes + l);
    }
    for (int l = 0; l < kLanes; ++l) {
        box_muller(words[2][l], words[3][l], values + 2 * kLanes + l, values + 3 * kLanes + l);
    }
}

}  // namespace wmengine
