// Dense projections whose matrix is drawn as it is used: random signs, or Gaussian values by Box and Muller.
//
// Signs are applied four at a time (the method of four Russians). Forward, the 16 signed sums of four weights of a lane
// are tabulated once and looked up by every row, rows side by side in a vector; the index is four neighbouring bits of
// the row's word. The adjoint tabulates the 16 signed sums of four rows' gradients, which every weight looks up, lanes
// side by side; its index, a weight's bit in each of four words, comes from transposing 4 x 4 bits.
// Every instruction set adds in the same order.
#include <algorithm>

#include "generator.h"
#include "philox_lanes.h"
#include "projection.h"

namespace wmengine {
namespace {

constexpr int kRowBatch = 256;  // rows that share the tables of a lane
constexpr int kQuads = 4;       // tables of four rows that one pass over a block of the adjoint applies

template <Level level>
using Float = Floats<lanes_of(level)>;
template <Level level>
using Word = Words32<lanes_of(level)>;
template <Level level>
using Int = Ints<lanes_of(level)>;

// entries[i] = (±v0 ± v1) + (±v2 ± v3), minus where bit k of i is set.
template <Level level>
WM_INLINE void tabulate(float v0, float v1, float v2, float v3, float* entries) {
    constexpr int lanes = lanes_of(level);
    for (int begin = 0; begin < 16; begin += lanes) {
        const Word<level> index = (Word<level>)iota<lanes>() + static_cast<uint32_t>(begin);
        const auto signed_value = [index](float value, uint32_t bit) __attribute__((always_inline)) {
            return flip(spread<lanes>(value), index << (31 - bit));
        };
        store(entries + begin,
              (signed_value(v0, 0) + signed_value(v1, 1)) + (signed_value(v2, 2) + signed_value(v3, 3)));
    }
}

// The table's entry for the low four bits of each lane.
template <Level level>
WM_INLINE Float<level> look_up(const float* entries, Word<level> index) {
    if constexpr (level == Level::kBaseline) {
        Float<level> found;
        for (int i = 0; i < lanes_of(level); ++i) {
            found[i] = entries[index[i] & 15];
        }
        return found;
    } else if constexpr (lanes_of(level) == 16) {
        return permute(load<Float<level>>(entries), (Int<level>)index);
    } else {
        const Float<level> low = permute(load<Float<level>>(entries), (Int<level>)index);
        const Float<level> high = permute(load<Float<level>>(entries + 8), (Int<level>)index);
        return (Int<level>)(index << 28) < 0 ? high : low;
    }
}

// Bit k of nibble n of x[j] goes to bit j of nibble n of x[k].
template <typename V>
WM_INLINE void transpose_nibbles(V* x) {
    const auto exchange = [](V& a, V& b, uint32_t shift, uint32_t mask) __attribute__((always_inline)) {
        const V moved = ((a >> shift) ^ b) & mask;
        b ^= moved;
        a ^= moved << shift;
    };
    exchange(x[0], x[2], 2, 0x33333333u);
    exchange(x[1], x[3], 2, 0x33333333u);
    exchange(x[0], x[1], 1, 0x55555555u);
    exchange(x[2], x[3], 1, 0x55555555u);
}

// acc[row] += the signed sum of the 4096 (or fewer) weights at `values`, for `vectors` vectors of rows.
template <Level level>
WM_INLINE void add_signed_block(const float* values, int lane_rows, uint64_t block, uint64_t key,
                                const RowTable<kRowBatch>& rows, int vectors, float* acc) {
    const RoundKeys keys(key);
    const int nibbles = (lane_rows + 3) / 4;
    for (int lane = 0; lane < kLanes; ++lane) {
        alignas(64) float tables[kBlockRows / 4][16];
        for (int n = 0; n < nibbles; ++n) {
            const float* four = values + 4 * n * kLanes + lane;
            tabulate<level>(four[0], four[kLanes], four[2 * kLanes], four[3 * kLanes], tables[n]);
        }
        const LaneState<uint64_t> state = lane_state(static_cast<uint32_t>(block * kLanes + lane), kDomainDense, key);
        for (int v = 0; v < vectors; ++v) {
            Word<level> words[4];
            draw_rows<level>(state, rows, v * lanes_of(level), keys, words);
            Float<level> sums[4] = {};
            for (int w = 0; w < 4; ++w) {
                const int here = std::min(8, nibbles - 8 * w);
                if (here == 8) {
#pragma GCC unroll 8
                    for (int n = 0; n < 8; ++n) {
                        sums[w] += look_up<level>(tables[8 * w + n], words[w] >> static_cast<uint32_t>(4 * n));
                    }
                } else {
                    for (int n = 0; n < here; ++n, words[w] >>= 4) {
                        sums[w] += look_up<level>(tables[8 * w + n], words[w]);
                    }
                }
            }
            float* sum = acc + v * lanes_of(level);
            store(sum, load<Float<level>>(sum) + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
        }
    }
}

template <Level level>
WM_INLINE void add_gaussian_block(const float* values, int groups, uint64_t first_group, uint64_t key,
                                  const RowTable<kRowBatch>& rows, int vectors, float* acc) {
    const RoundKeys keys(key);
    for (int group = 0; group < groups; ++group) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const float* w = values + group * kGaussianBlock + lane;
            const LaneState<uint64_t> state =
                lane_state(static_cast<uint32_t>((first_group + group) * kLanes + lane), kDomainGaussian, key);
            for (int v = 0; v < vectors; ++v) {
                Word<level> words[4];
                draw_rows<level>(state, rows, v * lanes_of(level), keys, words);
                Float<level> z[4];
                box_muller_lanes<lanes_of(level)>(words[0], words[1], &z[0], &z[1]);
                box_muller_lanes<lanes_of(level)>(words[2], words[3], &z[2], &z[3]);
                float* sum = acc + v * lanes_of(level);
                store(sum, load<Float<level>>(sum) +
                               ((w[0] * z[0] + w[kLanes] * z[1]) + (w[2 * kLanes] * z[2] + w[3 * kLanes] * z[3])));
            }
        }
    }
}

struct DenseRun {
    template <Level level>
    WM_INLINE void run(const float* w, int64_t first, int64_t count, uint64_t key, Projection kind, int64_t row,
                       int64_t rows, float* sums) {
        constexpr int lanes = lanes_of(level);
        alignas(64) float acc[kRowBatch];
        float padded[kBlock];
        for (int64_t from = 0; from < rows; from += kRowBatch) {
            const int batch = static_cast<int>(std::min<int64_t>(kRowBatch, rows - from));
            const int vectors = (batch + lanes - 1) / lanes;
            RowTable<kRowBatch> table;
            for (int t = 0; t < vectors * lanes; ++t) {
                const RowState<uint64_t> state = row_state(static_cast<uint32_t>(row + from + t), key);
                table.hi[place<lanes>(t)] = state.hi;
                table.lo[place<lanes>(t)] = state.lo;
            }
            for (int64_t begin = 0; begin < count; begin += kBlock) {
                const int64_t here = std::min<int64_t>(kBlock, count - begin);
                const uint64_t block = (first + begin) / kBlock;
                const float* values = w + begin;
                if (here < kBlock) {
                    std::fill(std::copy(values, values + here, padded), padded + kBlock, 0.0f);
                    values = padded;
                }
                std::fill(acc, acc + vectors * lanes, 0.0f);
                if (kind == Projection::kRademacher) {
                    const int lane_rows = static_cast<int>((here + kLanes - 1) / kLanes);
                    add_signed_block<level>(values, lane_rows, block, key, table, vectors, acc);
                } else {
                    const int groups = static_cast<int>((here + kGaussianBlock - 1) / kGaussianBlock);
                    add_gaussian_block<level>(values, groups, block * (kBlock / kGaussianBlock), key, table, vectors,
                                              acc);
                }
                for (int t = 0; t < batch; ++t) {
                    sums[from + t] += acc[t];
                }
            }
        }
    }
};

// sums[m] += Σ_t ± g[t] over `rows` <= 16 rows from `row` for the first `lane_rows` rows of lanes of a block.
template <Level level, int quads>
WM_INLINE void spread_signs(const float (*tables)[16], const Word<level> (*x)[4][4], int lane_rows, float* sums) {
    for (int w = 0; 32 * w < lane_rows; ++w) {
        for (int n = 0; n < 8; ++n) {
            for (int j = 0; j < 4; ++j) {
                float* at = sums + (32 * w + 4 * n + j) * kLanes;
                Float<level> sum = load<Float<level>>(at);
                for (int q = 0; q < quads; ++q) {
                    sum += look_up<level>(tables[q], x[q][w][j] >> static_cast<uint32_t>(4 * n));
                }
                store(at, sum);
            }
        }
    }
}

template <Level level>
WM_INLINE void spread_signed_block(const float* g, int64_t rows, int lane_rows, uint64_t block, uint64_t key,
                                   float* sums) {
    constexpr int lanes = lanes_of(level);
    const RoundKeys keys(key);
    LaneTable<kLanes> states;
    for (int lane = 0; lane < kLanes; ++lane) {
        states.set(place<lanes>(lane), lane_state(static_cast<uint32_t>(block * kLanes + lane), kDomainDense, key));
    }
    for (int64_t t = 0; t < rows; t += 4 * kQuads) {
        const int here = static_cast<int>(std::min<int64_t>(4 * kQuads, rows - t)), quads = (here + 3) / 4;
        alignas(64) float tables[kQuads][16];
        float padded[4 * kQuads] = {};
        std::copy(g + t, g + t + here, padded);
        for (int q = 0; q < quads; ++q) {
            tabulate<level>(padded[4 * q], padded[4 * q + 1], padded[4 * q + 2], padded[4 * q + 3], tables[q]);
        }
        for (int lane = 0; lane < kLanes; lane += lanes) {
            Word<level> x[kQuads][4][4];  // of each quad of rows, each word, each row
            for (int k = 0; k < 4 * quads; ++k) {
                Word<level> words[4] = {};
                if (k < here) {
                    draw_lanes<level>(states, lane, row_state(static_cast<uint32_t>(t + k), key), keys, words);
                }
                for (int w = 0; w < 4; ++w) {
                    x[k / 4][w][k % 4] = words[w];
                }
            }
            for (int q = 0; q < quads; ++q) {
                for (int w = 0; w < 4; ++w) {
                    transpose_nibbles(x[q][w]);
                }
            }
            if (quads == kQuads) {
                spread_signs<level, kQuads>(tables, x, lane_rows, sums + lane);
            } else {
                for (int q = 0; q < quads; ++q) {
                    spread_signs<level, 1>(tables + q, x + q, lane_rows, sums + lane);
                }
            }
        }
    }
}

template <Level level>
WM_INLINE void spread_gaussian_block(const float* g, int64_t rows, int groups, uint64_t first_group, uint64_t key,
                                     float* sums) {
    constexpr int lanes = lanes_of(level);
    const RoundKeys keys(key);
    for (int group = 0; group < groups; ++group) {
        LaneTable<kLanes> states;
        for (int lane = 0; lane < kLanes; ++lane) {
            const uint32_t counter = static_cast<uint32_t>((first_group + group) * kLanes + lane);
            states.set(place<lanes>(lane), lane_state(counter, kDomainGaussian, key));
        }
        for (int64_t t = 0; t < rows; ++t) {
            const RowState<uint64_t> state = row_state(static_cast<uint32_t>(t), key);
            for (int lane = 0; lane < kLanes; lane += lanes) {
                Word<level> words[4];
                draw_lanes<level>(states, lane, state, keys, words);
                Float<level> z[4];
                box_muller_lanes<lanes>(words[0], words[1], &z[0], &z[1]);
                box_muller_lanes<lanes>(words[2], words[3], &z[2], &z[3]);
                for (int i = 0; i < 4; ++i) {
                    float* at = sums + group * kGaussianBlock + i * kLanes + lane;
                    store(at, load<Float<level>>(at) + g[t] * z[i]);
                }
            }
        }
    }
}

struct DenseAdjointRun {
    template <Level level>
    WM_INLINE void run(const float* g, int64_t rows, int64_t first, int64_t count, uint64_t key, Projection kind,
                       bool accumulate, float* out) {
        alignas(64) float sums[kBlock];
        for (int64_t begin = 0; begin < count; begin += kBlock) {
            const int64_t here = std::min<int64_t>(kBlock, count - begin);
            const uint64_t block = (first + begin) / kBlock;
            std::fill(sums, sums + kBlock, 0.0f);
            if (kind == Projection::kRademacher) {
                const int lane_rows = static_cast<int>((here + kLanes - 1) / kLanes);
                spread_signed_block<level>(g, rows, lane_rows, block, key, sums);
            } else {
                const int groups = static_cast<int>((here + kGaussianBlock - 1) / kGaussianBlock);
                spread_gaussian_block<level>(g, rows, groups, block * (kBlock / kGaussianBlock), key, sums);
            }
            for (int64_t m = 0; m < here; ++m) {
                out[begin + m] = accumulate ? out[begin + m] + sums[m] : sums[m];
            }
        }
    }
};

}  // namespace

void dense_run(const float* w, int64_t first, int64_t count, uint64_t key, Projection kind, int64_t row, int64_t rows,
               float* sums) {
    dispatch<DenseRun>(w, first, count, key, kind, row, rows, sums);
}

void dense_adjoint_run(const float* g, int64_t rows, int64_t first, int64_t count, uint64_t key, Projection kind,
                       bool accumulate, float* out) {
    dispatch<DenseAdjointRun>(g, rows, first, count, key, kind, accumulate, out);
}

}  // namespace wmengine
