// Dense projections and their adjoints: the matrix is drawn in registers, one Philox counter a lane, and never stored.
//
// Forward, a warp keeps weights in registers and meets 32 matrix rows one after the other; lane r keeps row r's sum.
// Backward, a thread block owns 4096 weights: its four warps draw a batch of rows into shared memory together, then
// each adds the batch to its own quarter of the weights, so that no counter is drawn twice.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace wmengine::cuda {
namespace {

constexpr int kTileRows = kLanes;          // matrix rows a warp meets: one a lane
constexpr int kWordRows = kBlockRows / 4;  // rows of a block whose signs share a word
constexpr int kSignWarps = 4;              // 128 registers of weights a lane leave room for three such thread blocks
constexpr int kGaussianWarps = 8;
constexpr int kAdjointWarps = 4;
constexpr int kBatch = 16;  // matrix rows drawn into shared memory at a time

struct Shape {
    int64_t units;   // pieces of the weights that a warp takes at a time
    int64_t tiles;   // tiles of 32 matrix rows
    int64_t groups;  // thread blocks that share a tile: as many partial sums
};

Shape shape_of(int64_t count, int64_t total, Kind kind) {
    const bool signs = kind == Kind::kRademacher;
    Shape shape;
    shape.units = ceil_div(count, signs ? kBlock : kGaussianBlock);
    shape.tiles = ceil_div(total, kTileRows);
    const int64_t resident = signs ? 3 : 5;  // thread blocks that fit a multiprocessor's registers
    const int64_t most = std::max<int64_t>(kMultiprocessors * resident / shape.tiles, 1);
    shape.groups = std::max<int64_t>(std::min(ceil_div(shape.units, signs ? kSignWarps : kGaussianWarps), most), 1);
    return shape;
}

// Writes each warp's 32 row sums to shared memory and adds the warps in order.
template <int kWarps>
__device__ __forceinline__ void store_tile(float mine, int64_t group, int64_t first_row, int64_t total,
                                           float* __restrict__ partials) {
    __shared__ float sums[kWarps][kTileRows];
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    sums[warp][lane] = mine;
    __syncthreads();
    if (warp == 0 && first_row + lane < total) {
        float all = 0.0f;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) {
            all += sums[i][lane];
        }
        partials[group * total + first_row + lane] = all;
    }
}

__global__ void __launch_bounds__(kSignWarps* kLanes)
    rademacher_kernel(const float* __restrict__ w, int64_t count, uint64_t key, int64_t total, int64_t units,
                      int64_t groups, float* __restrict__ partials) {
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int64_t group = blockIdx.x % groups, first_row = blockIdx.x / groups * kTileRows;
    const int rows = static_cast<int>(min(static_cast<int64_t>(kTileRows), total - first_row));
    float mine = 0.0f;
    for (int64_t block = group * kSignWarps + warp; block < units; block += groups * kSignWarps) {
        float weights[kBlockRows];
        const int64_t first = block * kBlock + lane;
#pragma unroll
        for (int i = 0; i < kBlockRows; ++i) {
            const int64_t m = first + i * kLanes;
            weights[i] = m < count ? w[m] : 0.0f;
        }
#pragma unroll 1
        for (int r = 0; r < rows; ++r) {
            const Words words = philox4x32(static_cast<uint32_t>(block * kLanes + lane),
                                           static_cast<uint32_t>(first_row + r), 0, kDomainDense, key);
            float sums[4] = {};
#pragma unroll
            for (int i = 0; i < kWordRows; ++i) {
#pragma unroll
                for (int q = 0; q < 4; ++q) {
                    sums[q] += flip(weights[q * kWordRows + i], words.w[q], i);
                }
            }
            const float sum = warp_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
            mine = lane == r ? mine + sum : mine;
        }
    }
    store_tile<kSignWarps>(mine, group, first_row, total, partials);
}

__global__ void __launch_bounds__(kGaussianWarps* kLanes)
    gaussian_kernel(const float* __restrict__ w, int64_t count, uint64_t key, int64_t total, int64_t units,
                    int64_t groups, float* __restrict__ partials) {
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int64_t group = blockIdx.x % groups, first_row = blockIdx.x / groups * kTileRows;
    const int rows = static_cast<int>(min(static_cast<int64_t>(kTileRows), total - first_row));
    float mine = 0.0f;
    for (int64_t unit = group * kGaussianWarps + warp; unit < units; unit += groups * kGaussianWarps) {
        float weights[4];
        const int64_t first = unit * kGaussianBlock + lane;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int64_t m = first + i * kLanes;
            weights[i] = m < count ? w[m] : 0.0f;
        }
#pragma unroll 1
        for (int r = 0; r < rows; ++r) {
            const Words words = philox4x32(static_cast<uint32_t>(unit * kLanes + lane),
                                           static_cast<uint32_t>(first_row + r), 0, kDomainGaussian, key);
            float x[4];
            box_muller(words.w[0], words.w[1], &x[0], &x[1]);
            box_muller(words.w[2], words.w[3], &x[2], &x[3]);
            const float sum =
                warp_sum((x[0] * weights[0] + x[1] * weights[1]) + (x[2] * weights[2] + x[3] * weights[3]));
            mine = lane == r ? mine + sum : mine;
        }
    }
    store_tile<kGaussianWarps>(mine, group, first_row, total, partials);
}

__global__ void __launch_bounds__(kAdjointWarps* kLanes)
    rademacher_adjoint_kernel(const float* __restrict__ g, int64_t total, uint64_t key, float scale, bool accumulate,
                              int64_t count, float* __restrict__ out) {
    __shared__ uint32_t signs[kBatch][4][kLanes];
    __shared__ float values[kBatch];
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int64_t blocks = (count + kBlock - 1) / kBlock;
    for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
        float sums[kWordRows] = {};
        for (int64_t first_row = 0; first_row < total; first_row += kBatch) {
            const int rows = static_cast<int>(min(static_cast<int64_t>(kBatch), total - first_row));
            for (int r = warp; r < rows; r += kAdjointWarps) {
                const Words words = philox4x32(static_cast<uint32_t>(block * kLanes + lane),
                                               static_cast<uint32_t>(first_row + r), 0, kDomainDense, key);
#pragma unroll
                for (int q = 0; q < 4; ++q) {
                    signs[r][q][lane] = words.w[q];
                }
                if (lane == 0) {
                    values[r] = scale * g[first_row + r];
                }
            }
            __syncthreads();
#pragma unroll 1
            for (int r = 0; r < rows; ++r) {
                const uint32_t word = signs[r][warp][lane];
                const float value = values[r];
#pragma unroll
                for (int i = 0; i < kWordRows; ++i) {
                    sums[i] += flip(value, word, i);
                }
            }
            __syncthreads();
        }
        const int64_t first = block * kBlock + warp * kWordRows * kLanes + lane;
#pragma unroll
        for (int i = 0; i < kWordRows; ++i) {
            const int64_t m = first + i * kLanes;
            if (m < count) {
                out[m] = accumulate ? out[m] + sums[i] : sums[i];
            }
        }
    }
}

__global__ void __launch_bounds__(kAdjointWarps* kLanes)
    gaussian_adjoint_kernel(const float* __restrict__ g, int64_t total, uint64_t key, float scale, bool accumulate,
                            int64_t count, float* __restrict__ out) {
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int64_t units = (count + kGaussianBlock - 1) / kGaussianBlock;
    for (int64_t unit = int64_t{blockIdx.x} * kAdjointWarps + warp; unit < units;
         unit += int64_t{gridDim.x} * kAdjointWarps) {
        float sums[4] = {};
#pragma unroll 1
        for (int64_t t = 0; t < total; ++t) {
            const Words words = philox4x32(static_cast<uint32_t>(unit * kLanes + lane), static_cast<uint32_t>(t), 0,
                                           kDomainGaussian, key);
            const float value = scale * g[t];
            float x[4];
            box_muller(words.w[0], words.w[1], &x[0], &x[1]);
            box_muller(words.w[2], words.w[3], &x[2], &x[3]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sums[i] += value * x[i];
            }
        }
        const int64_t first = unit * kGaussianBlock + lane;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int64_t m = first + i * kLanes;
            if (m < count) {
                out[m] = accumulate ? out[m] + sums[i] : sums[i];
            }
        }
    }
}

void check_sizes(int64_t count, int64_t total) {
    if (count < 0) {
        throw std::invalid_argument("count is " + std::to_string(count) + ": it must not be negative");
    }
    if (total < 1 || total > (int64_t{1} << 31)) {
        throw std::invalid_argument("total is " + std::to_string(total) + ": it must lie between 1 and 2^31");
    }
}

}  // namespace

int64_t project_workspace(int64_t count, int64_t total, Kind kind) {
    check_sizes(count, total);
    return shape_of(count, total, kind).groups * total;
}

void project(Place place, const float* w, int64_t count, uint64_t key, int64_t total, Kind kind, float scale,
             float* workspace, float* y) {
    check_sizes(count, total);
    const DeviceGuard guard(place.device, "project");
    const cudaStream_t stream = stream_of(place);
    const Shape shape = shape_of(count, total, kind);
    const unsigned grid = static_cast<unsigned>(shape.tiles * shape.groups);
    if (kind == Kind::kRademacher) {
        rademacher_kernel<<<grid, kSignWarps * kLanes, 0, stream>>>(w, count, key, total, shape.units, shape.groups,
                                                                    workspace);
    } else {
        gaussian_kernel<<<grid, kGaussianWarps * kLanes, 0, stream>>>(w, count, key, total, shape.units, shape.groups,
                                                                      workspace);
    }
    check(cudaGetLastError(), "project");
    reduce_partials(workspace, shape.groups, total, total, scale, y, stream);
    check(cudaGetLastError(), "project");
}

void project_adjoint(Place place, const float* g, int64_t total, uint64_t key, Kind kind, float scale, bool accumulate,
                     int64_t count, float* out) {
    check_sizes(count, total);
    if (count == 0) {
        return;
    }
    const DeviceGuard guard(place.device, "project_adjoint");
    const cudaStream_t stream = stream_of(place);
    const int64_t most = kMultiprocessors * 16;
    if (kind == Kind::kRademacher) {
        const unsigned grid = static_cast<unsigned>(std::min(ceil_div(count, kBlock), most));
        rademacher_adjoint_kernel<<<grid, kAdjointWarps * kLanes, 0, stream>>>(g, total, key, scale, accumulate, count,
                                                                               out);
    } else {
        const unsigned grid = static_cast<unsigned>(std::min(ceil_div(count, kGaussianBlock * kAdjointWarps), most));
        gaussian_adjoint_kernel<<<grid, kAdjointWarps * kLanes, 0, stream>>>(g, total, key, scale, accumulate, count,
                                                                             out);
    }
    check(cudaGetLastError(), "project_adjoint");
}

}  // namespace wmengine::cuda
