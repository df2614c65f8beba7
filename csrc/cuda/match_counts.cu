// Argmax of every answer, then matches with each set of expected labels: answers are read once, in lines of 16 bytes.
//
// The first kernel writes one integer a row (-1 where the row holds NaN or infinity); label_matches.cu counts them. The
// threads that share a row grow with C.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace wmengine::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInvalid = -1;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// The first maximum among the values seen so far, and whether all of them were finite.
struct Best {
    float value = -INFINITY;
    int index = INT_MAX;
    bool finite = true;

    __device__ __forceinline__ void consider(float candidate, int at) {  // `at` must grow from call to call
        finite &= fabsf(candidate) <= FLT_MAX;                           // false for NaN too
        if (candidate > value) {
            value = candidate;
            index = at;
        }
    }

    __device__ __forceinline__ void merge(float other_value, int other_index, bool other_finite) {
        finite &= other_finite;
        if (other_value > value || (other_value == value && other_index < index)) {
            value = other_value;
            index = other_index;
        }
    }
};

// What thread `member` of `kMembers` sees of a row: single values up to a 16-byte boundary, 16 bytes at a time, the
// rest.
template <typename T, int kMembers>
__device__ __forceinline__ Best scan_row(const T* __restrict__ row, int classes, int member) {
    constexpr int kVector = 16 / sizeof(T);
    Best best;
    if (classes < kMembers * kVector) {
        for (int c = member; c < classes; c += kMembers) {
            best.consider(to_float(row[c]), c);
        }
        return best;
    }
    const int behind = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    const int head = behind == 0 ? 0 : kVector - behind;
    if (member < head) {
        best.consider(to_float(row[member]), member);
    }
    const int vectors = (classes - head) / kVector;
    const uint4* __restrict__ body = reinterpret_cast<const uint4*>(row + head);
#pragma unroll 4
    for (int v = member; v < vectors; v += kMembers) {
        union {
            uint4 bits;
            T values[kVector];
        } line;
        line.bits = body[v];
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            best.consider(to_float(line.values[i]), head + v * kVector + i);
        }
    }
    for (int c = head + vectors * kVector + member; c < classes; c += kMembers) {
        best.consider(to_float(row[c]), c);
    }
    return best;
}

template <typename T, int kMembers>
__global__ void __launch_bounds__(kThreads)
    argmax_kernel(const T* __restrict__ outputs, int64_t rows, int classes, int32_t* __restrict__ predicted) {
    static_assert(kMembers <= kLanes || kMembers == kThreads, "a row belongs to part of a warp or to a whole block");
    constexpr int kRows = kThreads / kMembers;
    const int member = threadIdx.x % kMembers;
    for (int64_t first = int64_t{blockIdx.x} * kRows; first < rows; first += int64_t{gridDim.x} * kRows) {
        const int64_t row = first + threadIdx.x / kMembers;
        Best best;
        if (row < rows) {
            best = scan_row<T, kMembers>(outputs + row * classes, classes, member);
        }
#pragma unroll
        for (int step = (kMembers < kLanes ? kMembers : kLanes) / 2; step > 0; step >>= 1) {
            const float value = __shfl_xor_sync(kFullWarp, best.value, step);
            const int index = __shfl_xor_sync(kFullWarp, best.index, step);
            const int finite = __shfl_xor_sync(kFullWarp, static_cast<int>(best.finite), step);
            best.merge(value, index, finite != 0);
        }
        if constexpr (kMembers > kLanes) {
            constexpr int kWarps = kMembers / kLanes;
            __shared__ float values[kWarps];
            __shared__ int indices[kWarps];
            __shared__ int finites[kWarps];
            const int warp = threadIdx.x / kLanes;
            if (threadIdx.x % kLanes == 0) {
                values[warp] = best.value;
                indices[warp] = best.index;
                finites[warp] = best.finite;
            }
            __syncthreads();
            if (threadIdx.x == 0) {
#pragma unroll
                for (int i = 1; i < kWarps; ++i) {
                    best.merge(values[i], indices[i], finites[i] != 0);
                }
            }
            __syncthreads();
        }
        if (member == 0 && row < rows) {
            predicted[row] = best.finite ? best.index : kInvalid;
        }
    }
}

template <typename T>
void launch_argmax(const void* outputs, int64_t rows, int classes, int32_t* predicted, cudaStream_t stream) {
    const T* values = static_cast<const T*>(outputs);
    if (classes <= 32) {  // a full warp would leave most of its lanes without a value
        argmax_kernel<T, 4><<<grid_for(rows, kThreads / 4), kThreads, 0, stream>>>(values, rows, classes, predicted);
    } else if (classes <= 16384) {
        argmax_kernel<T, kLanes>
            <<<grid_for(rows, kThreads / kLanes), kThreads, 0, stream>>>(values, rows, classes, predicted);
    } else {
        argmax_kernel<T, kThreads><<<grid_for(rows, 1), kThreads, 0, stream>>>(values, rows, classes, predicted);
    }
    check(cudaGetLastError(), "match_counts");
}

}  // namespace

void match_counts(Place place, const void* outputs, Scalar scalar, int64_t suspects, int64_t rows, int64_t classes,
                  const int64_t* expected, int64_t sets, int32_t* predicted, int32_t* counts, int32_t* invalid) {
    if (suspects < 0 || rows < 0 || sets < 0 || rows > INT_MAX || classes < 1 || classes > INT_MAX - kThreads) {
        throw std::invalid_argument("outputs is [" + std::to_string(suspects) + ", " + std::to_string(rows) + ", " +
                                    std::to_string(classes) + "] and expected has " + std::to_string(sets) +
                                    " rows: sizes must not be negative, rows below 2^31, and classes from 1 to 2^31");
    }
    if (suspects == 0) {
        return;
    }
    const DeviceGuard guard(place.device, "match_counts");
    const cudaStream_t stream = stream_of(place);
    if (rows > 0) {
        const int columns = static_cast<int>(classes);
        switch (scalar) {
            case Scalar::kFloat32:
                launch_argmax<float>(outputs, suspects * rows, columns, predicted, stream);
                break;
            case Scalar::kFloat16:
                launch_argmax<__half>(outputs, suspects * rows, columns, predicted, stream);
                break;
            case Scalar::kBfloat16:
                launch_argmax<__nv_bfloat16>(outputs, suspects * rows, columns, predicted, stream);
                break;
        }
    }
    count_labels(predicted, suspects, rows, expected, sets, counts, invalid, stream, "match_counts");
}

}  // namespace wmengine::cuda
