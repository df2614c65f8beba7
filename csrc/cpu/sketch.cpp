// The sketch: one random sign and one bucket for each weight, in one pass over the weights (layout.h).
//
// Accumulators belong to destination rows; the source row of each run is found by XOR, because an XOR is its own
// inverse. The lane swap is the same for a whole block, so it is applied once to each finished row of 32 sums.
#include <algorithm>

#include "generator.h"
#include "projection.h"

namespace wmengine {
namespace {

constexpr int kMaximumRuns = kBlock / 32;

template <Level level>
using Float = Floats<lanes_of(level)>;
template <Level level>
constexpr int vectors = kLanes / lanes_of(level);  // of a row

// Lanes l of `row` in the order l ^ swap.
template <Level level>
WM_INLINE void load_swapped(const float* row, uint32_t swap, Float<level>* lanes) {
    constexpr uint32_t width = lanes_of(level);
    Ints<width> order;
    for (uint32_t i = 0; i < width; ++i) {
        order[i] = static_cast<int32_t>(i ^ (swap & (width - 1)));
    }
    for (uint32_t v = 0; v < vectors<level>; ++v) {
        lanes[v] = permute(load<Float<level>>(row + width * (v ^ (swap / width))), order);
    }
}

// Row i's signs of the v-th vector, in the top bits.
template <Level level>
WM_INLINE Words32<lanes_of(level)> vector_signs(const uint32_t (*words)[kLanes], int i, int v) {
    return load<Words32<lanes_of(level)>>(words[i >> 5] + v * lanes_of(level)) << static_cast<uint32_t>(31 - (i & 31));
}

struct Geometry {
    int runs;         // runs of `buckets` weights that begin in a block (1 where a run is longer than a block)
    int rows;         // rows of 32 lanes of one run within the block
    uint32_t source;  // first row of the block within its run (0 where runs are shorter)
    uint32_t offsets[kMaximumRuns];  // r / 32 of each run
    uint32_t swap;
};

WM_INLINE void block_geometry(uint64_t block, uint64_t key, int64_t buckets, Geometry* geometry) {
    geometry->swap = lane_swap(block, key);
    if (buckets >= kBlock) {
        const uint64_t first = block * kBlock;
        geometry->runs = 1;
        geometry->rows = kBlockRows;
        geometry->source = static_cast<uint32_t>(first % buckets / kLanes);
        geometry->offsets[0] = run_offset(first / buckets, static_cast<uint32_t>(buckets), key) / kLanes;
        return;
    }
    geometry->runs = static_cast<int>(kBlock / buckets);
    geometry->rows = static_cast<int>(buckets / kLanes);
    geometry->source = 0;
    const uint64_t first = block * geometry->runs;
    const uint32_t mask = static_cast<uint32_t>(buckets - 1);
    if (geometry->runs >= 8) {
        for (int k = 0; k < geometry->runs; k += 8) {
            uint32_t words[4][8];
            draw_words<8>(first + k, static_cast<uint32_t>(first >> 32), kDomainRun, key, words);
            for (int j = 0; j < 8; ++j) {
                geometry->offsets[k + j] = (words[0][j] & mask) / kLanes;
            }
        }
    } else {
        for (int k = 0; k < geometry->runs; ++k) {
            geometry->offsets[k] = run_offset(first + k, mask + 1, key) / kLanes;
        }
    }
}

// The rows of a block are visited in the key's order, which no hardware prefetcher follows: with every row that is
// read, the row in the same place of the visit is asked for in the next block, in ascending order. 3 to 4 times faster
// from memory.
template <int for_writing>
WM_INLINE void prefetch_row(const float* next_block, int visit) {
    __builtin_prefetch(next_block + visit * kLanes, for_writing);
    __builtin_prefetch(next_block + visit * kLanes + 16, for_writing);
}

template <Level level>
WM_INLINE void add_block(const float* w, uint64_t block, uint64_t key, int64_t buckets, float* sums) {
    constexpr int lanes = lanes_of(level);
    uint32_t words[4][kLanes];
    block_signs(block, 0, kDomainSketch, key, words);
    Geometry geometry;
    block_geometry(block, key, buckets, &geometry);
    for (int d = 0; d < geometry.rows; ++d) {
        Float<level> total[vectors<level>];
        uint32_t destination = d;
        if (buckets >= kBlock) {  // every row has its own destination
            destination = (geometry.source + d) ^ geometry.offsets[0];
            for (int v = 0; v < vectors<level>; ++v) {
                total[v] = flip(load<Float<level>>(w + d * kLanes + v * lanes), vector_signs<level>(words, d, v));
            }
        } else {
            for (int v = 0; v < vectors<level>; ++v) {
                total[v] = spread<lanes>(0);
            }
            for (int k = 0; k < geometry.runs; ++k) {
                const int i = k * geometry.rows + static_cast<int>(d ^ geometry.offsets[k]);
                const float* row = w + i * kLanes;
                prefetch_row<0>(w + kBlock, d * geometry.runs + k);
                for (int v = 0; v < vectors<level>; ++v) {
                    total[v] += flip(load<Float<level>>(row + v * lanes), vector_signs<level>(words, i, v));
                }
            }
        }
        float row[kLanes];
        for (int v = 0; v < vectors<level>; ++v) {
            store(row + v * lanes, total[v]);
        }
        Float<level> swapped[vectors<level>];
        load_swapped<level>(row, geometry.swap, swapped);
        float* sum = sums + static_cast<int64_t>(destination) * kLanes;
        for (int v = 0; v < vectors<level>; ++v) {
            store(sum + v * lanes, load<Float<level>>(sum + v * lanes) + swapped[v]);
        }
    }
}

template <Level level, bool accumulate>
WM_INLINE void spread_block(const float* g, uint64_t block, uint64_t key, int64_t buckets, float* out) {
    constexpr int lanes = lanes_of(level);
    uint32_t words[4][kLanes];
    block_signs(block, 0, kDomainSketch, key, words);
    Geometry geometry;
    block_geometry(block, key, buckets, &geometry);
    for (int d = 0; d < geometry.rows; ++d) {
        const bool own = buckets >= kBlock;
        const uint32_t source = own ? (geometry.source + d) ^ geometry.offsets[0] : d;
        Float<level> value[vectors<level>];
        load_swapped<level>(g + static_cast<int64_t>(source) * kLanes, geometry.swap, value);
        for (int k = 0; k < geometry.runs; ++k) {
            const int i = own ? d : k * geometry.rows + static_cast<int>(d ^ geometry.offsets[k]);
            float* row = out + i * kLanes;
            if (!own) {
                prefetch_row<1>(out + kBlock, d * geometry.runs + k);
            }
            for (int v = 0; v < vectors<level>; ++v) {
                const Float<level> added = flip(value[v], vector_signs<level>(words, i, v));
                float* at = row + v * lanes;
                store(at, accumulate ? load<Float<level>>(at) + added : added);
            }
        }
    }
}

struct SketchRun {
    template <Level level>
    WM_INLINE void run(const float* w, int64_t first, int64_t count, uint64_t key, int64_t buckets, float* sums) {
        uint64_t block = first / kBlock;
        for (; count >= kBlock; count -= kBlock, w += kBlock, ++block) {
            add_block<level>(w, block, key, buckets, sums);
        }
        if (count > 0) {
            float tail[kBlock] = {};
            std::copy(w, w + count, tail);
            add_block<level>(tail, block, key, buckets, sums);
        }
    }
};

struct SketchAdjointRun {
    template <Level level>
    WM_INLINE void run(const float* g, int64_t first, int64_t count, uint64_t key, int64_t buckets, bool accumulate,
                       float* out) {
        uint64_t block = first / kBlock;
        for (; count >= kBlock; count -= kBlock, out += kBlock, ++block) {
            if (accumulate) {
                spread_block<level, true>(g, block, key, buckets, out);
            } else {
                spread_block<level, false>(g, block, key, buckets, out);
            }
        }
        if (count > 0) {
            float tail[kBlock];
            spread_block<level, false>(g, block, key, buckets, tail);
            for (int64_t m = 0; m < count; ++m) {
                out[m] = accumulate ? out[m] + tail[m] : tail[m];
            }
        }
    }
};

}  // namespace

void sketch_run(const float* w, int64_t first, int64_t count, uint64_t key, int64_t buckets, float* sums) {
    dispatch<SketchRun>(w, first, count, key, buckets, sums);
}

void sketch_adjoint_run(const float* g, int64_t first, int64_t count, uint64_t key, int64_t buckets, bool accumulate,
                        float* out) {
    dispatch<SketchAdjointRun>(g, first, count, key, buckets, accumulate, out);
}

}  // namespace wmengine
