// Which random number belongs to which weight: the one layout, the same on every device, frozen by golden vectors.
//
// Signs are "lane-major". 4096 consecutive weights are a block; weight m sits in block b = m / 4096, in row
// i = (m % 4096) / 32 of the block, in lane l = m % 32 of the row:
//
//      block b      lane 0   lane 1   ...  lane 31
//      row 0      |  m=0   |  m=1   | ... | m=31  |     lane l draws ONE counter (b*32 + l, t, 0, domain);
//      row 1      |  m=32  |  m=33  | ... | m=63  |     its 4 words hold 128 bits, one for each row:
//        ...                                            sign of row i = bit i%32 of word i/32, 1 = negative.
//      row 127    | m=4064 |  ...   | ... | m=4095|
//
// 32 lanes are one warp (a counter a thread, coalesced loads, no shuffles) or four AVX2 vectors.
//
// The sketch adds each signed weight to one of P buckets (P a power of two >= 32):
//
//      bucket(m) = ((m mod P) XOR r(m / P)) XOR e(m / 4096)
//
// r, a multiple of 32 below P drawn per run of P weights, moves whole rows of 32 lanes; e, below 32 and drawn per
// block, swaps lanes (without e, pruning half the input channels of a 1x1 layer empties up to half the buckets).
//
// Dense Gaussian rows draw 128 values a step: weight m has b = m / 128, i = (m % 128) / 32, l = m % 32, counter
// (b*32 + l, t, 0, 5); words (0, 1) make values 0 and 1 by Box-Muller, words (2, 3) values 2 and 3.
//
// Domain 6 draws trigger images, in wmengine/triggers.py only: word w of image n is word w % 4 of (w / 4, n, 0, 6).
#pragma once

#include <cstdint>

#include "philox.h"

namespace wmengine {

constexpr int kLanes = 32;
constexpr int kBlock = 4096;                 // weights whose signs come from one counter a lane
constexpr int kBlockRows = kBlock / kLanes;  // 128 rows, one bit each
constexpr int kGaussianBlock = 4 * kLanes;   // 128 weights, one Gaussian word each
constexpr int64_t kChunk =
    32 * (int64_t)kBlock;  // weights whose partial sums are added first: fixes the order of addition

constexpr uint32_t kDomainDense = 1;
constexpr uint32_t kDomainSketch = 2;
constexpr uint32_t kDomainRun = 3;
constexpr uint32_t kDomainSwap = 4;
constexpr uint32_t kDomainGaussian = 5;

// Row offset of run m / P: a multiple of 32 below `buckets`.
WM_HOST_DEVICE uint32_t run_offset(uint64_t run, uint32_t buckets, uint64_t key) {
    const Words words = philox4x32(static_cast<uint32_t>(run), static_cast<uint32_t>(run >> 32), 0, kDomainRun, key);
    return words.w[0] & (buckets - 1) & ~31u;
}

// Lane swap of block m / 4096: below 32.
WM_HOST_DEVICE uint32_t lane_swap(uint64_t block, uint64_t key) {
    return philox4x32(static_cast<uint32_t>(block), 0, 0, kDomainSwap, key).w[0] & 31u;
}

// log2(e)-free natural logarithm of u = n * 2^-24, n in [1, 2^24], by atanh series on [sqrt(1/2), sqrt(2)); < 2 ulp.
WM_HOST_DEVICE float log_unit24(uint32_t n) {
    union {
        float f;
        uint32_t u;
    } value;
    value.f = static_cast<float>(n);        // exact
    uint32_t bits = value.u - 0x3F3504F3u;  // so that the mantissa lands in [sqrt(1/2), sqrt(2))
    const int exponent = static_cast<int>(bits) >> 23;
    value.u = (bits & 0x007FFFFFu) + 0x3F3504F3u;
    const float f = value.f - 1.0f;
    const float s = f / (2.0f + f), z = s * s;
    const float series = z * (0.66666668f + z * (0.4000000f + z * (0.28571429f + z * (0.22222222f + z * 0.18181818f))));
    const float k = static_cast<float>(exponent - 24);
    // log(1+f) = 2s + s*series; the high part of ln 2 times k is exact.
    return k * 0.693145752f + (k * 1.42860677e-06f + (2.0f * s + s * series));
}

// cos and sin of 2*pi*n*2^-24, n < 2^24: octant by integer arithmetic, then minimax polynomials on [-pi/4, pi/4].
WM_HOST_DEVICE void cos_sin_turn24(uint32_t n, float* cosine, float* sine) {
    const uint32_t shifted = n + (1u << 21);  // quadrant boundaries at odd multiples of pi/4
    const uint32_t quadrant = (shifted >> 22) & 3u;
    const float x = static_cast<float>(static_cast<int>(shifted & 0x3FFFFFu) - (1 << 21)) * (1.57079633f / 4194304.0f);
    const float z = x * x;
    const float s = x + x * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - z * 1.9515295891e-4f));
    const float c =
        1.0f - 0.5f * z + z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
    const float a = (quadrant & 1u) ? s : c, b = (quadrant & 1u) ? c : s;
    *cosine = (quadrant == 1u || quadrant == 2u) ? -a : a;
    *sine = (quadrant >= 2u) ? -b : b;
}

// Two standard normal values from two words (Box and Muller 1958); |z| <= 5.77.
WM_HOST_DEVICE void box_muller(uint32_t word0, uint32_t word1, float* first, float* second) {
    const float logarithm = log_unit24((word0 >> 8) + 1u);
#if defined(__CUDA_ARCH__)
    const float radius = sqrtf(-2.0f * logarithm);
#else
    const float radius = __builtin_sqrtf(-2.0f * logarithm);
#endif
    float cosine, sine;
    cos_sin_turn24(word1 >> 8, &cosine, &sine);
    *first = radius * cosine;
    *second = radius * sine;
}

}  // namespace wmengine
