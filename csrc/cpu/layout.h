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
WM_INLINE uint32_t run_offset(uint64_t run, uint32_t buckets, uint64_t key) {
    const Words words = philox4x32(static_cast<uint32_t>(run), static_cast<uint32_t>(run >> 32), 0, kDomainRun, key);
    return words.w[0] & (buckets - 1) & ~31u;
}

// Lane swap of block m / 4096: below 32.
WM_INLINE uint32_t lane_swap(uint64_t block, uint64_t key) {
    return philox4x32(static_cast<uint32_t>(block), 0, 0, kDomainSwap, key).w[0] & 31u;
}

}  // namespace wmengine
