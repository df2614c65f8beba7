// The sketch and its adjoint: one warp walks a block of 4096 weights, one Philox counter a lane (layout.h).
//
// Accumulators belong to destination buckets, so that a lane's register array is indexed by constants only: lane l owns
// bucket row * 32 + l of every row. The swap e and the offset r are XORs, hence their own inverses, and go to the
// source side: the lane reads source lane l ^ e of source row (row ^ r / 32). A warp's 32 reads still fall into one
// line of 128 bytes, and no lane exchanges sums with another.
//
// Up to 4096 buckets a unit of work is a block, which holds 4096 / P whole runs. Above, a run covers P / 4096 blocks
// and the high bits of r choose the source block; the buckets are cut into tiles of 4096, a unit is one run of one
// tile, and the rest is the same code.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "launch.h"

namespace wmengine::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kQuarterRows = 32;          // rows of a block whose signs share a word
constexpr int kStage = kQuarterRows / 4;  // weights that a lane of the accumulating adjoint has in flight

// Blocks resident on a multiprocessor, by rows of accumulators: bounds the registers a thread may use.
__host__ __device__ constexpr int resident(int rows) { return rows <= 8 ? 4 : rows <= 32 ? 2 : 1; }

struct Shape {
    int rows;        // rows of 32 buckets in a tile
    int64_t tiles;   // tiles of the buckets
    int64_t units;   // units of work of each tile
    int64_t groups;  // thread blocks that share a tile: as many partial sums
};

Shape shape_of(int64_t count, int64_t buckets) {
    Shape shape;
    shape.rows = static_cast<int>(std::min<int64_t>(buckets, kBlock) / kLanes);
    shape.tiles = std::max<int64_t>(buckets / kBlock, 1);
    shape.units = ceil_div(count, std::max<int64_t>(buckets, kBlock));
    const int64_t most = std::max<int64_t>(kMultiprocessors * resident(shape.rows) / shape.tiles, 1);
    shape.groups = std::max<int64_t>(std::min(ceil_div(shape.units, kWarps), most), 1);
    return shape;
}

// What a lane needs to walk one block: its source lane's sign words, and the offsets of the block's runs over the
// lanes.
template <int kRows>
struct Walk {
    static constexpr int kRuns = kBlockRows / kRows;
    static constexpr int kOffsets = (kRuns + kLanes - 1) / kLanes;

    int64_t first;  // weight 0 of the source block
    int source_lane;
    Words words;
    uint32_t offsets[kOffsets];  // r / 32 of run lane, lane + 32, ...; of the one run where kRuns is 1

    __device__ __forceinline__ Walk(int64_t unit, int64_t tile, int64_t tiles, int64_t buckets, uint64_t key,
                                    int lane) {
        int64_t block = unit;
        if constexpr (kRuns == 1) {
            const uint32_t offset = run_offset(static_cast<uint64_t>(unit), static_cast<uint32_t>(buckets), key);
            offsets[0] = offset / kLanes % kBlockRows;
            block = unit * tiles + (tile ^ (offset / kBlock));
        } else {
#pragma unroll
            for (int i = 0; i < kOffsets; ++i) {
                offsets[i] = 0;
                if constexpr (kRows > 1) {
                    const int run = kRuns < kLanes ? lane % kRuns : lane + i * kLanes;
                    offsets[i] = run_offset(static_cast<uint64_t>(unit) * kRuns + run, kRows * kLanes, key) / kLanes;
                }
            }
        }
        first = block * kBlock;
        source_lane = lane ^ static_cast<int>(lane_swap(static_cast<uint64_t>(block), key));
        words = philox4x32(static_cast<uint32_t>(block * kLanes + source_lane), 0, 0, kDomainSketch, key);
    }

    __device__ __forceinline__ uint32_t offset(int run) const {
        if constexpr (kRows == 1) {
            return 0;
        } else if constexpr (kRuns == 1) {
            return offsets[0];
        } else {
            const uint32_t held = kOffsets > 1 && run >= kLanes ? offsets[kOffsets - 1] : offsets[0];
            return __shfl_sync(kFullWarp, held, run % kLanes);
        }
    }

    __device__ __forceinline__ uint32_t word(uint32_t index) const {
        const uint32_t low = index & 1u ? words.w[1] : words.w[0], high = index & 1u ? words.w[3] : words.w[2];
        return index & 2u ? high : low;
    }
};

// Calls body(slot, row, source, word, bit) for places kBegin + slot, slot < kSize, of the 32 destination rows of a
// quarter block; `slot` and `row`, the accumulator's row in the tile, are constants after unrolling; the weight stands
// at `source` in the block and its sign in bit `bit` of `word`.
template <int kRows, int kBegin, int kSize, typename Body>
__device__ __forceinline__ void visit(const Walk<kRows>& walk, int quarter, int part, Body body) {
    constexpr int kTileRows = kRows < kQuarterRows ? kRows : kQuarterRows;
    constexpr int kTileRuns = kQuarterRows / kTileRows;
    uint32_t source_quarter = quarter, offset = 0;
    if constexpr (kRows > kQuarterRows) {
        offset = walk.offset(quarter * kQuarterRows / kRows);
        source_quarter ^= offset / kQuarterRows;
        offset %= kQuarterRows;
    }
    const uint32_t word = walk.word(source_quarter);
    const uint32_t corner = source_quarter * kQuarterRows * kLanes + walk.source_lane;
#pragma unroll
    for (int at = kBegin; at < kBegin + kSize; ++at) {
        if (kRows <= kQuarterRows && (at == kBegin || at % kTileRows == 0)) {
            offset = walk.offset(quarter * kTileRuns + at / kTileRows);
        }
        const uint32_t bit = at ^ offset;
        const int row = part * kQuarterRows + at % kTileRows;
        body(at - kBegin, row, corner + bit * kLanes, word, bit);
    }
}

// Runs body(quarter, part) for the four quarters of a block; `part`, the quarter's place in its run, chooses among the
// accumulators and is a constant. The rest is a loop: one copy of the code leaves the registers to loads in flight.
template <int kRows, typename Body>
__device__ __forceinline__ void for_quarters(Body body) {
    constexpr int kParts = kRows > kQuarterRows ? kRows / kQuarterRows : 1;
#pragma unroll 1
    for (int first = 0; first < 4; first += kParts) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            body(first + part, part);
        }
    }
}

template <int kRows, bool kWhole>
__device__ __forceinline__ void add_block(const Walk<kRows>& walk, const float* __restrict__ w, int64_t count,
                                          float (&sums)[kRows]) {
    const float* __restrict__ block = w + walk.first;
    const int64_t left = count - walk.first;
    for_quarters<kRows>([&](int quarter, int part) {
        visit<kRows, 0, kQuarterRows>(walk, quarter, part,
                                      [&](int, int row, uint32_t source, uint32_t word, uint32_t bit) {
                                          sums[row] += flip(kWhole || source < left ? block[source] : 0.0f, word, bit);
                                      });
    });
}

template <int kRows>
__global__ void __launch_bounds__(kWarps* kLanes, resident(kRows))
    sketch_kernel(const float* __restrict__ w, int64_t count, uint64_t key, int64_t buckets, int64_t tiles,
                  int64_t units, int64_t groups, float* __restrict__ partials) {
    __shared__ float shared[kRows * kLanes];
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int64_t tile = blockIdx.x / groups, group = blockIdx.x % groups;
    float sums[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        sums[row] = 0.0f;
    }
    for (int64_t unit = group * kWarps + warp; unit < units; unit += groups * kWarps) {
        const Walk<kRows> walk(unit, tile, tiles, buckets, key, lane);
        if (walk.first + kBlock <= count) {
            add_block<kRows, true>(walk, w, count, sums);
        } else if (walk.first < count) {
            add_block<kRows, false>(walk, w, count, sums);
        }
    }
    for (int turn = 0; turn < kWarps; ++turn) {  // warps add in order
        if (warp == turn) {
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
                const int at = row * kLanes + lane;
                shared[at] = turn == 0 ? sums[row] : shared[at] + sums[row];
            }
        }
        __syncthreads();
    }
    float* partial = partials + group * buckets + tile * kBlock;
    for (int at = threadIdx.x; at < kRows * kLanes; at += kWarps * kLanes) {
        partial[at] = shared[at];
    }
}

template <int kRows, int kBegin, bool kWhole, bool kAccumulate>
__device__ __forceinline__ void spread_stage(const Walk<kRows>& walk, int quarter, int part,
                                             const float (&values)[kRows], int64_t left, float* block) {
    float stage[kStage];  // read first, written after: the compiler may not move a load over a store to the same array
    if constexpr (kAccumulate) {
        visit<kRows, kBegin, kStage>(walk, quarter, part, [&](int slot, int, uint32_t source, uint32_t, uint32_t) {
            stage[slot] = kWhole || source < left ? block[source] : 0.0f;
        });
    }
    visit<kRows, kBegin, kStage>(walk, quarter, part,
                                 [&](int slot, int row, uint32_t source, uint32_t word, uint32_t bit) {
                                     const float value = flip(values[row], word, bit);
                                     if (kWhole || source < left) {
                                         if constexpr (kAccumulate) {
                                             block[source] = stage[slot] + value;
                                         } else {
                                             block[source] = value;
                                         }
                                     }
                                 });
}

template <int kRows, bool kWhole, bool kAccumulate>
__device__ __forceinline__ void spread_block(const Walk<kRows>& walk, const float (&values)[kRows], int64_t count,
                                             float* out) {
    float* block = out + walk.first;
    const int64_t left = count - walk.first;
    for_quarters<kRows>([&](int quarter, int part) {
        spread_stage<kRows, 0, kWhole, kAccumulate>(walk, quarter, part, values, left, block);
        spread_stage<kRows, kStage, kWhole, kAccumulate>(walk, quarter, part, values, left, block);
        spread_stage<kRows, 2 * kStage, kWhole, kAccumulate>(walk, quarter, part, values, left, block);
        spread_stage<kRows, 3 * kStage, kWhole, kAccumulate>(walk, quarter, part, values, left, block);
    });
}

template <int kRows, bool kAccumulate>
__global__ void __launch_bounds__(kWarps* kLanes, resident(kRows))
    sketch_adjoint_kernel(const float* __restrict__ g, int64_t total, uint64_t key, int64_t buckets, float scale,
                          int64_t tiles, int64_t units, int64_t groups, int64_t count, float* __restrict__ out) {
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int64_t tile = blockIdx.x / groups, group = blockIdx.x % groups;
    float values[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        const int64_t t = tile * kBlock + row * kLanes + lane;
        values[row] = t < total ? scale * g[t] : 0.0f;
    }
    for (int64_t unit = group * kWarps + warp; unit < units; unit += groups * kWarps) {
        const Walk<kRows> walk(unit, tile, tiles, buckets, key, lane);
        if (walk.first + kBlock <= count) {
            spread_block<kRows, true, kAccumulate>(walk, values, count, out);
        } else if (walk.first < count) {
            spread_block<kRows, false, kAccumulate>(walk, values, count, out);
        }
    }
}

// Calls body with the number of rows as a compile-time constant.
template <typename Body>
void with_rows(int rows, Body body) {
    switch (rows) {
        case 1:
            return body(std::integral_constant<int, 1>());
        case 2:
            return body(std::integral_constant<int, 2>());
        case 4:
            return body(std::integral_constant<int, 4>());
        case 8:
            return body(std::integral_constant<int, 8>());
        case 16:
            return body(std::integral_constant<int, 16>());
        case 32:
            return body(std::integral_constant<int, 32>());
        case 64:
            return body(std::integral_constant<int, 64>());
        default:
            return body(std::integral_constant<int, 128>());
    }
}

void check_sizes(int64_t count, int64_t buckets, int64_t total) {
    if (count < 0) {
        throw std::invalid_argument("count is " + std::to_string(count) + ": it must not be negative");
    }
    if (buckets < kLanes || (buckets & (buckets - 1)) != 0 || buckets > (int64_t{1} << 31)) {
        throw std::invalid_argument("buckets is " + std::to_string(buckets) +
                                    ": it must be a power of two from 32 to 2^31");
    }
    if (total < 1 || total > buckets) {
        throw std::invalid_argument("total is " + std::to_string(total) +
                                    ": it must lie between 1 and buckets = " + std::to_string(buckets));
    }
}

}  // namespace

int64_t sketch_workspace(int64_t count, int64_t buckets) {
    check_sizes(count, buckets, 1);
    return shape_of(count, buckets).groups * buckets;
}

void sketch(Place place, const float* w, int64_t count, uint64_t key, int64_t buckets, int64_t total, float scale,
            float* workspace, float* y) {
    check_sizes(count, buckets, total);
    const DeviceGuard guard(place.device, "sketch");
    const cudaStream_t stream = stream_of(place);
    const Shape shape = shape_of(count, buckets);
    with_rows(shape.rows, [&](auto rows) {
        sketch_kernel<rows.value><<<static_cast<unsigned>(shape.tiles * shape.groups), kWarps * kLanes, 0, stream>>>(
            w, count, key, buckets, shape.tiles, shape.units, shape.groups, workspace);
    });
    check(cudaGetLastError(), "sketch");
    reduce_partials(workspace, shape.groups, buckets, total, scale, y, stream);
    check(cudaGetLastError(), "sketch");
}

void sketch_adjoint(Place place, const float* g, int64_t total, uint64_t key, int64_t buckets, float scale,
                    bool accumulate, int64_t count, float* out) {
    check_sizes(count, buckets, total);
    if (count == 0) {
        return;
    }
    const DeviceGuard guard(place.device, "sketch_adjoint");
    const cudaStream_t stream = stream_of(place);
    const Shape shape = shape_of(count, buckets);
    with_rows(shape.rows, [&](auto rows) {
        const auto kernel =
            accumulate ? sketch_adjoint_kernel<rows.value, true> : sketch_adjoint_kernel<rows.value, false>;
        kernel<<<static_cast<unsigned>(shape.tiles * shape.groups), kWarps * kLanes, 0, stream>>>(
            g, total, key, buckets, scale, shape.tiles, shape.units, shape.groups, count, out);
    });
    check(cudaGetLastError(), "sketch_adjoint");
}

}  // namespace wmengine::cuda
