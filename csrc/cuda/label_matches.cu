// Every suspect's labels against every set of expected labels: S x K counts of N comparisons each.
//
// A thread block owns 64 suspects x 64 sets and a thread 4 x 4 of them; 32 labels of each of the 128 rows at a time
// stand in shared memory, turned so that a thread reads four rows' labels in 16 bytes. Few suspects or few sets would
// leave most of such a tile idle: there a warp or a thread block owns one count. Counts are integers, so adding slices
// of a long row by atomics changes no result.
#include <algorithm>
#include <climits>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace wmengine::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;                 // rows of either side that a thread block owns
constexpr int kQuad = 4;                  // rows of either side that a thread owns
constexpr int kQuads = kTile / kQuad;     // threads along either side
constexpr int kSteps = 32;                // labels of a row that are in shared memory at a time
constexpr int kLeastSlice = 16 * kSteps;  // labels of a row below which cutting it is not worth an atomic
constexpr int kLeastSide = 8;             // suspects and sets from which on tiles are used
static_assert(kQuads * kQuads == kThreads, "a thread for each quad of suspects and quad of sets");

// Two answers that equal nothing, not each other either: a label that is negative or that the type cannot hold.
template <typename Label>
__device__ __forceinline__ Label answer_of(Label predicted) {
    return predicted < 0 ? Label{-1} : predicted;
}

template <typename Label>
__device__ __forceinline__ Label label_of(int64_t expected) {
    const Label label = static_cast<Label>(expected);
    return expected >= 0 && label == expected ? label : Label{-2};
}

template <typename Label>
struct alignas(16) Quad {
    Label labels[kQuad];
};

template <typename Label>
__global__ void __launch_bounds__(kThreads)
    tile_kernel(const Label* __restrict__ predicted, int64_t suspects, int64_t rows,
                const int64_t* __restrict__ expected, int64_t sets, int64_t slices, int64_t slice,
                int32_t* __restrict__ counts) {
    // One quad more than a row needs: the stores of neighbouring threads then fall into different banks.
    __shared__ Quad<Label> answers[kSteps][kQuads + 1];
    __shared__ Quad<Label> labels[kSteps][kQuads + 1];
    const int64_t set_tiles = (sets + kTile - 1) / kTile;
    const int64_t items = (suspects + kTile - 1) / kTile * set_tiles * slices;
    const int own_suspect = threadIdx.x / kQuads, own_set = threadIdx.x % kQuads;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const int64_t tile = item / slices, begin = item % slices * slice, end = min(begin + slice, rows);
        const int64_t first_suspect = tile / set_tiles * kTile, first_set = tile % set_tiles * kTile;
        int sums[kQuad][kQuad] = {};
        for (int64_t first = begin; first < end; first += kSteps) {
#pragma unroll
            for (int i = threadIdx.x; i < kTile * kSteps; i += kThreads) {
                const int step = i % kSteps, row = i / kSteps;
                const int64_t n = first + step, suspect = first_suspect + row, set = first_set + row;
                answers[step][row / kQuad].labels[row % kQuad] =
                    n < end && suspect < suspects ? answer_of(predicted[suspect * rows + n]) : Label{-1};
                labels[step][row / kQuad].labels[row % kQuad] =
                    n < end && set < sets ? label_of<Label>(expected[set * rows + n]) : Label{-2};
            }
            __syncthreads();
#pragma unroll 8
            for (int step = 0; step < kSteps; ++step) {
                const Quad<Label> a = answers[step][own_suspect], b = labels[step][own_set];
#pragma unroll
                for (int i = 0; i < kQuad; ++i) {
#pragma unroll
                    for (int j = 0; j < kQuad; ++j) {
                        sums[i][j] += a.labels[i] == b.labels[j];
                    }
                }
            }
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
#pragma unroll
            for (int j = 0; j < kQuad; ++j) {
                const int64_t suspect = first_suspect + own_suspect * kQuad + i, set = first_set + own_set * kQuad + j;
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
    const int64_t wanted = std::min(ceil_div(2 * kMultiprocessors, tiles), ceil_div(rows, kLeastSlice));
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
