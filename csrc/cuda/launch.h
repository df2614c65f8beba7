// What every kernel file needs around a launch: the device guard and the check.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "ops.h"

namespace wmengine::cuda {

constexpr int kLanes = 32;  // of a warp
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

}  // namespace wmengine::cuda
