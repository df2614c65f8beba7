// What every kernel file needs around a launch: the device guard, the check, and the fixed second pass over partial
// sums.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "../common/layout.h"
#include "ops.h"

namespace wmengine::cuda {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;

// Grids are sized for the 132 multiprocessors of an H100 or H200 on every card: a grid read off the card would change
// the order of addition, and with it the last bits of an answer.
constexpr int64_t kMultiprocessors = 132;

void check(cudaError_t status, const char* operation);

// Makes `device` current for a scope and puts the caller's device back.
class DeviceGuard {
public:
    DeviceGuard(int device, const char* operation);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int previous_ = 0;
    bool changed_ = false;
};

inline cudaStream_t stream_of(Place place) { return reinterpret_cast<cudaStream_t>(place.stream); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Thread blocks for `items` that need no order: enough to fill any card, each taking every grid-th item.
inline unsigned grid_for(int64_t items, int64_t items_per_block) {
    return static_cast<unsigned>(std::min(ceil_div(items, items_per_block), kMultiprocessors * 32));
}

// y[t] = scale * Σ_group partials[group, t] for t < total, groups added in one fixed order.
void reduce_partials(const float* partials, int64_t groups, int64_t width, int64_t total, float scale, float* y,
                     cudaStream_t stream);

// The value with its sign flipped where bit `bit` of `word` is set.
__device__ __forceinline__ float flip(float value, uint32_t word, uint32_t bit) {
    return __uint_as_float(__float_as_uint(value) ^ ((word << (31u - bit)) & 0x80000000u));
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) {
        value += __shfl_xor_sync(kFullWarp, value, step);
    }
    return value;
}

}  // namespace wmengine::cuda
