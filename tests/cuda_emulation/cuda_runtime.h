// Stands in for CUDA's header where g++ compiles the .cu files: a thread of a block is a fiber, one runs at a time.
//
// Only what csrc/cuda uses is here; anything else fails to compile. Barriers and shuffles switch fibers, shared memory
// is static because one block runs at a time. What this cannot show is in tests/test_gpu.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using std::max;
using std::min;

struct Index {
    unsigned x;
};
extern Index threadIdx, blockIdx, gridDim, blockDim;

struct uint4 {
    unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
    return std::memset(at, value, bytes), cudaSuccess;
}

namespace emulation {

// Runs `kernel` once for each of grid * block threads; what the test's rewriting makes of <<<grid, block, ...>>>.
void launch(unsigned grid, unsigned block, const std::function<void()>& kernel);

void block_barrier();
void warp_barrier();
uint64_t shuffle(uint64_t value, int source);
unsigned warp_or(unsigned value);

}  // namespace emulation

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp() { emulation::warp_barrier(); }

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = emulation::shuffle(bits, source & 31);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
    return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ step);
}

inline unsigned __reduce_or_sync(unsigned, unsigned value) { return emulation::warp_or(value); }

inline int __reduce_add_sync(unsigned mask, int value) {
    for (int step = 16; step > 0; step >>= 1) {
        value += __shfl_xor_sync(mask, value, step);
    }
    return value;
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return __reduce_or_sync(mask, predicate ? 1u << threadIdx.x % 32 : 0u);
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

template <typename T>
T atomicAdd(T* at, T value) {
    const T old = *at;
    *at = old + value;
    return old;
}

template <typename T>
T __ldg(const T* at) {
    return *at;
}

inline unsigned atomicOr(unsigned* at, unsigned value) {
    const unsigned old = *at;
    *at = old | value;
    return old;
}

inline float __saturatef(float value) { return value > 0.0f ? min(value, 1.0f) : 0.0f; }  // of NaN too

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

inline int __clz(uint32_t bits) { return bits == 0 ? 32 : __builtin_clz(bits); }

inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
