// Philox for vectors of counters (c0, t, 0, domain): lane after lane of one row t, or row after row of one lane.
//
// Two of the ten rounds are shared. With c2 = 0 the first round multiplies c0 only, and the second multiplies t by
// itself, so what is known of the lane and what is known of the row are prepared once each (LaneState, RowState) and
// meet in the third round.
//
// A 32-bit word lives in the low half of a 64-bit lane, and what is left of a product in the upper half is never
// cleared: the multiplication reads low halves only. So a round is two multiplications, two shifts and two pairs of
// XOR. Counters of even places are in one vector, those of odd places in another, and the results are interleaved.
#pragma once

#include "layout.h"
#include "simd.h"

namespace wmengine {

template <int lanes>
using Wide = typename Vectors<lanes>::Wide;

// Products of the low halves of 64-bit lanes. Written out for GCC, which does not see that the upper halves do not
// matter and multiplies 64 by 64 bits in three steps; Clang does see it.
template <Level level>
WM_INLINE Wide<lanes_of(level)> multiply_words(Wide<lanes_of(level)> a, Wide<lanes_of(level)> b) {
#if defined(WM_X86_64) && !defined(__clang__)
    Wide<lanes_of(level)> product;
    if constexpr (level != Level::kBaseline) {
        asm("vpmuludq %2, %1, %0" : "=v"(product) : "v"(a), "v"(b));
    } else {
        typedef uint64_t Half __attribute__((vector_size(16)));
        Half x[2], y[2];
        std::memcpy(x, &a, sizeof x);
        std::memcpy(y, &b, sizeof y);
        asm("pmuludq %1, %0" : "+x"(x[0]) : "x"(y[0]));
        asm("pmuludq %1, %0" : "+x"(x[1]) : "x"(y[1]));
        std::memcpy(&product, x, sizeof x);
    }
    return product;
#else
    return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

template <typename T>
struct LaneState {
    T c2, c0, hi, lo;
};

template <typename T>
struct RowState {
    T hi, lo;
};

WM_INLINE uint64_t round_key0(uint64_t key, int round) {
    return static_cast<uint32_t>(static_cast<uint32_t>(key) + static_cast<uint32_t>(round) * kPhiloxWeyl0);
}

WM_INLINE uint64_t round_key1(uint64_t key, int round) {
    return static_cast<uint32_t>(static_cast<uint32_t>(key >> 32) + static_cast<uint32_t>(round) * kPhiloxWeyl1);
}

WM_INLINE LaneState<uint64_t> lane_state(uint32_t c0, uint32_t domain, uint64_t key) {
    const uint64_t first = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
    const uint32_t c2 = static_cast<uint32_t>((first >> 32) ^ domain ^ round_key1(key, 0));
    const uint64_t second = static_cast<uint64_t>(kPhiloxMultiplier1) * c2;
    const uint32_t next = static_cast<uint32_t>((second >> 32) ^ round_key0(key, 1));
    const uint64_t third = static_cast<uint64_t>(kPhiloxMultiplier0) * next;
    return {static_cast<uint32_t>(first), static_cast<uint32_t>(second ^ round_key0(key, 2)),
            (third >> 32) ^ round_key1(key, 2), static_cast<uint32_t>(third)};
}

WM_INLINE RowState<uint64_t> row_state(uint32_t row, uint64_t key) {
    const uint32_t c0 = static_cast<uint32_t>(row ^ round_key0(key, 0));
    const uint64_t product = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
    return {(product >> 32) ^ round_key1(key, 1), static_cast<uint32_t>(product)};
}

// The place of counter i among the 64-bit lanes of a vector pair of so many lanes: even ones first.
template <int lanes>
WM_INLINE int place(int i) {
    return i / lanes * lanes + i % 2 * (lanes / 2) + i % lanes / 2;
}

// A table of `count` states in vector pairs, counter i at place<lanes>(i).
template <int count>
struct LaneTable {
    alignas(64) uint64_t c2[count], c0[count], hi[count], lo[count];

    inline __attribute__((always_inline)) void set(int at, LaneState<uint64_t> state) {
        c2[at] = state.c2, c0[at] = state.c0, hi[at] = state.hi, lo[at] = state.lo;
    }
};

template <int count>
struct RowTable {
    alignas(64) uint64_t hi[count], lo[count];
};

template <Level level>
WM_INLINE Wide<lanes_of(level)> wide(uint64_t x) {
    uint64_t copies[lanes_of(level) / 2];
    for (uint64_t& copy : copies) {
        copy = x;
    }
    return load<Wide<lanes_of(level)>>(copies);
}

// The keys of rounds 3 to 9, each in every lane of a vector: rounds read them from memory.
struct RoundKeys {
    alignas(64) uint64_t first[kPhiloxRounds][8], second[kPhiloxRounds][8];

    explicit RoundKeys(uint64_t key) {
        for (int round = 3; round < kPhiloxRounds; ++round) {
            for (int i = 0; i < 8; ++i) {
                first[round][i] = round_key0(key, round);
                second[round][i] = round_key1(key, round);
            }
        }
    }
};

// The third to the tenth round, for two vectors in step: the counters of even and of odd places → their four words.
template <Level level, typename V = Wide<lanes_of(level)>>
WM_INLINE void finish_rounds(const LaneState<V>* lane, const RowState<V>* row, const RoundKeys& keys,
                             Words32<lanes_of(level)>* words) {
    const V m0 = wide<level>(kPhiloxMultiplier0), m1 = wide<level>(kPhiloxMultiplier1);
    V c0[2], c1[2], c2[2], c3[2];
    for (int half = 0; half < 2; ++half) {
        c1[half] = multiply_words<level>(lane[half].c2 ^ row[half].hi, m1);
        c0[half] = (c1[half] >> 32) ^ lane[half].c0;
        c2[half] = lane[half].hi ^ row[half].lo;
        c3[half] = lane[half].lo;
    }
#pragma GCC unroll 8
    for (int round = 3; round < kPhiloxRounds; ++round) {
        const V k0 = load<V>(keys.first[round]), k1 = load<V>(keys.second[round]);
        for (int half = 0; half < 2; ++half) {
            const V p0 = multiply_words<level>(c0[half], m0), p1 = multiply_words<level>(c2[half], m1);
            c0[half] = (p1 >> 32) ^ c1[half] ^ k0;
            c2[half] = (p0 >> 32) ^ c3[half] ^ k1;
            c1[half] = p1;
            c3[half] = p0;
        }
    }
    const auto interleave = [](const V* word) __attribute__((always_inline)) {
        return (Words32<lanes_of(level)>)((word[0] & wide<level>(0xFFFFFFFFu)) | (word[1] << 32));
    };
    words[0] = interleave(c0), words[1] = interleave(c1), words[2] = interleave(c2), words[3] = interleave(c3);
}

// Words of the counters of one lane, for lanes_of(level) rows that begin at `at` in the table.
template <Level level, int count>
WM_INLINE void draw_rows(LaneState<uint64_t> lane, const RowTable<count>& rows, int at, const RoundKeys& keys,
                         Words32<lanes_of(level)>* words) {
    typedef Wide<lanes_of(level)> V;
    const LaneState<V> same{wide<level>(lane.c2), wide<level>(lane.c0), wide<level>(lane.hi), wide<level>(lane.lo)};
    const LaneState<V> lanes[2] = {same, same};
    RowState<V> states[2];
    for (int half = 0; half < 2; ++half) {
        const int from = at + half * (lanes_of(level) / 2);
        states[half] = {load<V>(rows.hi + from), load<V>(rows.lo + from)};
    }
    finish_rounds<level>(lanes, states, keys, words);
}

// Words of the counters of one row, for lanes_of(level) lanes that begin at `at` in the table.
template <Level level, int count>
WM_INLINE void draw_lanes(const LaneTable<count>& lanes, int at, RowState<uint64_t> row, const RoundKeys& keys,
                          Words32<lanes_of(level)>* words) {
    typedef Wide<lanes_of(level)> V;
    const RowState<V> same{wide<level>(row.hi), wide<level>(row.lo)};
    const RowState<V> rows[2] = {same, same};
    LaneState<V> states[2];
    for (int half = 0; half < 2; ++half) {
        const int from = at + half * (lanes_of(level) / 2);
        states[half] = {load<V>(lanes.c2 + from), load<V>(lanes.c0 + from), load<V>(lanes.hi + from),
                        load<V>(lanes.lo + from)};
    }
    finish_rounds<level>(states, rows, keys, words);
}

}  // namespace wmengine
