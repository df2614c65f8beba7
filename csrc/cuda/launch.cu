// The device guard, the launch check, and the second pass that adds partial sums in a fixed order.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace wmengine::cuda {
namespace {

constexpr int kColumns = 32;
constexpr int kSlices = 32;

// A block owns 32 columns; its 32 warps add every 32nd group, then one warp adds the 32 slices in order.
__global__ void __launch_bounds__(kColumns* kSlices)
    reduce_kernel(const float* __restrict__ partials, int64_t groups, int64_t width, int64_t total, float scale,
                  float* __restrict__ y) {
    __shared__ float slices[kSlices][kColumns];
    const int column = threadIdx.x % kColumns, slice = threadIdx.x / kColumns;
    for (int64_t first = int64_t{blockIdx.x} * kColumns; first < total; first += int64_t{gridDim.x} * kColumns) {
        const int64_t t = first + column;
        float sum = 0.0f;
        if (t < total) {
#pragma unroll 4
            for (int64_t group = slice; group < groups; group += kSlices) {
                sum += partials[group * width + t];
            }
        }
        slices[slice][column] = sum;
        __syncthreads();
        if (slice == 0 && t < total) {
            float all = 0.0f;
#pragma unroll
            for (int i = 0; i < kSlices; ++i) {
                all += slices[i][column];
            }
            y[t] = scale * all;
        }
        __syncthreads();
    }
}

}  // namespace

void check(cudaError_t status, const char* operation) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(operation) + " failed on the GPU: " + cudaGetErrorString(status));
    }
}

DeviceGuard::DeviceGuard(int device, const char* operation) {
    check(cudaGetDevice(&previous_), operation);
    if (previous_ != device) {
        check(cudaSetDevice(device), operation);
        changed_ = true;
    }
}

DeviceGuard::~DeviceGuard() {
    if (changed_) {
        cudaSetDevice(previous_);
    }
}

void reduce_partials(const float* partials, int64_t groups, int64_t width, int64_t total, float scale, float* y,
                     cudaStream_t stream) {
    const int64_t grid = std::min<int64_t>(ceil_div(total, kColumns), kMultiprocessors * 16);
    reduce_kernel<<<static_cast<unsigned>(grid), kColumns * kSlices, 0, stream>>>(partials, groups, width, total, scale,
                                                                                  y);
}

int device_count() {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        cudaGetLastError();  // the failure is the answer: do not leave it for the next call
        return 0;
    }
    return count;
}

}  // namespace wmengine::cuda
