// Every suspect's labels against every set of expected labels: S x K counts of N comparisons each.
//
// A thread block owns 64 suspects x 64 sets and a thread 4 x 4 of them. Of 32 labels of a row at a time, bit b is one
// word in shared memory, so that 32 comparisons are one operation for each bit that any label has, and a count of bits.
// Few suspects or few sets would leave most of such a tile idle: there a warp or a thread block owns one count. Counts
// are integers, so adding slices of a long row by atomics changes no result.
#include <algorithm>
#include <climits>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace wmengine::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;              // rows of either side that a thread block owns
constexpr int kQuad = 4;               // rows of either side that a thread owns, and bits that it meets at a time
constexpr int kQuads = kTile / kQuad;  // threads along either side
constexpr int kSteps = 32;             // labels of a row that are in shared memory at a time
constexpr int kLoaded = kTile * kLanes / kThreads;  // rows of either side that a warp loads
constexpr int kLeastSide = 8;                       // suspects and sets from which on tiles are used
static_assert(kQuads * kQuads == kThreads, "a thread for each quad of suspects and quad of sets");
static_assert(kSteps == kLanes, "a lane for each label");

// 32 labels of each row of one side, as words of their bits; a label that is not `valid` equals nothing.
struct Side {
    uint32_t valid[kTile];
    uint4 bits[kTile][64 / kQuad + 1];  // one more: neighbouring rows then fall into different banks
};

// Turns what the lanes of a warp hold of kLoaded rows into words of `used` bits.
template <typename Label>
__device__ __forceinline__ void turn(const Label (&held)[kLoaded], int first, int used, Side& side) {
    const bool leads = threadIdx.x % kLanes == 0;
#pragma unroll
    for (int i = 0; i < kLoaded; ++i) {
        const uint32_t valid = __ballot_sync(kFullWarp, held[i] >= 0);
        if (leads) {
            side.valid[first + i] = valid;
        }
    }
#pragma unroll
    for (int half = 0; half < 64; half += 32) {
#pragma unroll 1
        for (int bit = 0; bit < min(used - half, 32); bit += kQuad) {
            const uint32_t lowest = 1u << bit;
#pragma unroll
            for (int i = 0; i < kLoaded; ++i) {
                const uint32_t part = static_cast<uint32_t>(int64_t{held[i]} >> half);
                const uint4 words = {__ballot_sync(kFullWarp, (part & lowest) != 0),
                                     __ballot_sync(kFullWarp, (part & lowest << 1) != 0),
                                     __ballot_sync(kFullWarp, (part & lowest << 2) != 0),
                                     __ballot_sync(kFullWarp, (part & lowest << 3) != 0)};
                if (leads) {
                    side.bits[first + i][(half + bit) / kQuad] = words;
                }
            }
        }
    }
}

template <typename Label>
__global__ void __launch_bounds__(kThreads, 2)
    tile_kernel(const Label* __restrict__ predicted, int64_t suspects, int64_t rows,
                const int64_t* __restrict__ expected, int64_t sets, int64_t slices, int64_t slice,
                int32_t* __restrict__ counts) {
    __shared__ Side answers, labels;
    __shared__ unsigned seen[2];  // bits that any label has had, low and high
    const int64_t set_tiles = (sets + kTile - 1) / kTile;
    const int64_t items = (suspects + kTile - 1) / kTile * set_tiles * slices;
    const int lane = threadIdx.x % kLanes, loaded = threadIdx.x / kLanes * kLoaded;
    const int own_suspect = threadIdx.x / kQuads, own_set = threadIdx.x % kQuads;
    if (threadIdx.x < 2) {
        seen[threadIdx.x] = 0;
    }
    __syncthreads();
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const int64_t tile = item / slices, begin = item % slices * slice, end = min(begin + slice, rows);
        const int64_t first_suspect = tile / set_tiles * kTile, first_set = tile % set_tiles * kTile;
        Label next_answers[kLoaded];
        int64_t next_labels[kLoaded];
        const int64_t suspect = first_suspect + loaded, set = first_set + loaded;
        const auto load = [&](int64_t n) {
            const int suspects_here = n < end ? static_cast<int>(min(suspects - suspect, int64_t{kLoaded})) : 0;
            const int sets_here = n < end ? static_cast<int>(min(sets - set, int64_t{kLoaded})) : 0;
            const Label* __restrict__ answer = predicted + suspect * rows + n;
            const int64_t* __restrict__ label = expected + set * rows + n;
#pragma unroll
            for (int i = 0; i < kLoaded; ++i, answer += rows, label += rows) {
                next_answers[i] = i < suspects_here ? *answer : Label{-1};
                next_labels[i] = i < sets_here ? *label : int64_t{-1};
            }
        };
        int sums[kQuad][kQuad] = {};
        load(begin + lane);
        for (int64_t first = begin; first < end; first += kSteps) {
            int64_t any = 0;
#pragma unroll
            for (int i = 0; i < kLoaded; ++i) {
                const int64_t answer = next_answers[i], label = next_labels[i];
                any |= (answer ^ answer >> 63) | (label ^ label >> 63);  // -1 has no bits
            }
            const unsigned low = __reduce_or_sync(kFullWarp, static_cast<unsigned>(any));
            const unsigned high = __reduce_or_sync(kFullWarp, static_cast<unsigned>(any >> 32));
            if (lane == 0) {
                atomicOr(&seen[0], low);
                atomicOr(&seen[1], high);
            }
            __syncthreads();  // and all have counted the labels before these
            const int used = seen[1] != 0 ? 64 - __clz(seen[1]) : 32 - __clz(seen[0]);
            turn(next_answers, loaded, used, answers);
            turn(next_labels, loaded, used, labels);
            load(first + kSteps + lane);  // on their way while these are counted
            __syncthreads();
            uint32_t equal[kQuad][kQuad];
#pragma unroll
            for (int i = 0; i < kQuad; ++i) {
#pragma unroll
                for (int j = 0; j < kQuad; ++j) {
                    equal[i][j] = answers.valid[own_suspect + i * kQuads] & labels.valid[own_set + j * kQuads];
                }
            }
#pragma unroll 1
            for (int quad = 0; quad * kQuad < used; ++quad) {
                uint4 a[kQuad], b[kQuad];
#pragma unroll
                for (int i = 0; i < kQuad; ++i) {
                    a[i] = answers.bits[own_suspect + i * kQuads][quad];
                    b[i] = labels.bits[own_set + i * kQuads][quad];
                }
#pragma unroll
                for (int i = 0; i < kQuad; ++i) {
#pragma unroll
                    for (int j = 0; j < kQuad; ++j) {
                        equal[i][j] &= ~(a[i].x ^ b[j].x);
                        equal[i][j] &= ~(a[i].y ^ b[j].y);
                        equal[i][j] &= ~(a[i].z ^ b[j].z);
                        equal[i][j] &= ~(a[i].w ^ b[j].w);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < kQuad; ++i) {
#pragma unroll
                for (int j = 0; j < kQuad; ++j) {
                    sums[i][j] += __popc(equal[i][j]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
#pragma unroll
            for (int j = 0; j < kQuad; ++j) {
                const int64_t suspect = first_suspect + own_suspect + i * kQuads;
                const int64_t set = first_set + own_set + j * kQuads;
                if (suspect < suspects && set < sets) {
                    if (slices == 1) {
                        counts[suspect * sets + set] = sums[i][j];
                    } else {
                        atomicAdd(&counts[suspect * sets + set], sums[i][j]);
                    }
                }
            }
        }
    }
}

template <typename Label, int kMembers>
__global__ void __launch_bounds__(kThreads)
    pair_kernel(const Label* __restrict__ predicted, int64_t suspects, int64_t rows,
                const int64_t* __restrict__ expected, int64_t sets, int32_t* __restrict__ counts) {
    static_assert(kMembers == kLanes || kMembers == kThreads, "a count belongs to a warp or to a whole block");
    constexpr int kItems = kThreads / kMembers;
    const int64_t items = suspects * sets;
    const int member = threadIdx.x % kMembers;
    for (int64_t first = int64_t{blockIdx.x} * kItems; first < items; first += int64_t{gridDim.x} * kItems) {
        const int64_t item = first + threadIdx.x / kMembers;
        const int64_t suspect = item / sets, set = item % sets;
        int count = 0;
        if (item < items) {
            const Label* __restrict__ answers = predicted + suspect * rows;
            const int64_t* __restrict__ labels = expected + set * rows;
#pragma unroll 4
            for (int64_t n = member; n < rows; n += kMembers) {
                const Label answer = answers[n];
                count += answer >= 0 && answer == labels[n];
            }
        }
#pragma unroll
        for (int step = kLanes / 2; step > 0; step >>= 1) {
            count += __shfl_xor_sync(kFullWarp, count, step);
        }
        if constexpr (kMembers > kLanes) {
            constexpr int kWarps = kMembers / kLanes;
            __shared__ int sums[kWarps];
            if (threadIdx.x % kLanes == 0) {
                sums[threadIdx.x / kLanes] = count;
            }
            __syncthreads();
            count = 0;
#pragma unroll
            for (int i = 0; i < kWarps; ++i) {
                count += sums[i];
            }
            __syncthreads();
        }
        if (member == 0 && item < items) {
            counts[item] = count;
        }
    }
}

template <typename Label>
void launch_pairs(const Label* predicted, int64_t suspects, int64_t rows, const int64_t* expected, int64_t sets,
                  int32_t* counts, cudaStream_t stream) {
    if (rows <= 4096) {
        pair_kernel<Label, kLanes><<<grid_for(suspects * sets, kThreads / kLanes), kThreads, 0, stream>>>(
            predicted, suspects, rows, expected, sets, counts);
    } else {
        pair_kernel<Label, kThreads>
            <<<grid_for(suspects * sets, 1), kThreads, 0, stream>>>(predicted, suspects, rows, expected, sets, counts);
    }
}

template <typename Label>
void launch_tiles(const Label* predicted, int64_t suspects, int64_t rows, const int64_t* expected, int64_t sets,
                  int32_t* counts, cudaStream_t stream) {
    const int64_t tiles = ceil_div(suspects, kTile) * ceil_div(sets, kTile);
    const int64_t wanted = std::min(2 * kMultiprocessors / tiles, ceil_div(rows, kSteps));
    const int64_t slice = ceil_div(ceil_div(rows, std::max<int64_t>(wanted, 1)), kSteps) * kSteps;
    const int64_t slices = std::max<int64_t>(ceil_div(rows, std::max<int64_t>(slice, 1)), 1);
    if (slices > 1) {
        check(cudaMemsetAsync(counts, 0, static_cast<size_t>(suspects * sets) * sizeof(int32_t), stream),
              "label_matches");
    }
    tile_kernel<Label><<<grid_for(tiles * slices, 1), kThreads, 0, stream>>>(predicted, suspects, rows, expected, sets,
                                                                             slices, slice, counts);
}

template <typename Label>
void count_labels(const Label* predicted, int64_t suspects, int64_t rows, const int64_t* expected, int64_t sets,
                  int32_t* counts, cudaStream_t stream) {
    if (std::min(suspects, sets) < kLeastSide) {
        launch_pairs(predicted, suspects, rows, expected, sets, counts, stream);
    } else {
        launch_tiles(predicted, suspects, rows, expected, sets, counts, stream);
    }
}

}  // namespace

void label_matches(Place place, const void* predicted, Integer integer, int64_t suspects, int64_t rows,
                   const int64_t* expected, int64_t sets, int32_t* counts) {
    if (suspects < 0 || rows < 0 || sets < 0 || rows > INT_MAX) {
        throw std::invalid_argument("predicted is [" + std::to_string(suspects) + ", " + std::to_string(rows) +
                                    "] and expected has " + std::to_string(sets) +
                                    " rows: sizes must not be negative and a row must hold fewer than 2^31 labels");
    }
    if (suspects == 0 || sets == 0) {
        return;
    }
    const DeviceGuard guard(place.device, "label_matches");
    const cudaStream_t stream = stream_of(place);
    if (integer == Integer::kInt32) {
        count_labels(static_cast<const int32_t*>(predicted), suspects, rows, expected, sets, counts, stream);
    } else {
        count_labels(static_cast<const int64_t*>(predicted), suspects, rows, expected, sets, counts, stream);
    }
    check(cudaGetLastError(), "label_matches");
}

}  // namespace wmengine::cuda
