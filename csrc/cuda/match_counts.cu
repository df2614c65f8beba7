// The class and the levels of every row of scores: a warp a row, or a thread block where a row is long.
//
// A row is read for its highest score, in lines of 16 bytes, and again from the caches: for its sum where no score is
// negative, for its mean and deviation, and for its levels. Sums are of doubles, in one order; a histogram is counted
// in shared memory.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace wmengine::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLongRow = 4096;  // classes from which on a row is a thread block's
constexpr int kInvalid = -1;
constexpr int kMostLevel = 30, kLevels = 2 * kMostLevel + 1;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// A score above the class it is of, so that the greatest key is the first of the highest scores. What is not below +Inf
// has a key above all others.
__device__ __forceinline__ uint64_t key_of(float score, int at) {
    if (!(score < INFINITY)) {
        return ~uint64_t{0};
    }
    const uint32_t bits = __float_as_uint(score + 0.0f);  // -0 is 0
    const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return uint64_t{ordered} << 32 | ~static_cast<uint32_t>(at);
}

__device__ __forceinline__ float score_of(uint64_t key) {
    const uint32_t ordered = static_cast<uint32_t>(key >> 32);
    return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7FFFFFFFu : ~ordered);
}

// f(score, class) for what thread `member` of `kMembers` sees of a row: single scores up to a 16-byte boundary, 16
// bytes at a time, the rest.
template <int kMembers, typename T, typename F>
__device__ __forceinline__ void each(const T* __restrict__ row, int classes, int member, F f) {
    constexpr int kVector = 16 / sizeof(T);
    if (classes < kMembers * kVector) {
        for (int c = member; c < classes; c += kMembers) {
            f(to_float(row[c]), c);
        }
        return;
    }
    const int behind = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    const int head = behind == 0 ? 0 : kVector - behind;
    if (member < head) {
        f(to_float(row[member]), member);
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
            f(to_float(line.values[i]), head + v * kVector + i);
        }
    }
    for (int c = head + vectors * kVector + member; c < classes; c += kMembers) {
        f(to_float(row[c]), c);
    }
}

// What all members of a row hold, folded into one value for each of them; every thread of the block calls it.
template <int kMembers, typename Value, typename Fold>
__device__ __forceinline__ Value folded(Value value, Fold fold) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step >>= 1) {
        value = fold(value, __shfl_xor_sync(kFullWarp, value, step));
    }
    if constexpr (kMembers > kLanes) {
        constexpr int kWarps = kMembers / kLanes;
        __shared__ Value values[kWarps];
        if (threadIdx.x % kLanes == 0) {
            values[threadIdx.x / kLanes] = value;
        }
        __syncthreads();
        value = values[0];
#pragma unroll
        for (int i = 1; i < kWarps; ++i) {
            value = fold(value, values[i]);
        }
        __syncthreads();
    }
    return value;
}

template <int kMembers>
__device__ __forceinline__ double sum_of(double value) {
    return folded<kMembers>(value, [](double a, double b) { return a + b; });
}

template <typename T, int kMembers>
__global__ void __launch_bounds__(kThreads) match_kernel(Matching given, Matches found) {
    static_assert(kMembers == kLanes || kMembers == kThreads, "a row belongs to a warp or to a whole block");
    constexpr int kRows = kThreads / kMembers;
    __shared__ uint32_t histograms[kRows][kLevels];
    const int member = threadIdx.x % kMembers, place = threadIdx.x / kMembers;
    const int classes = static_cast<int>(given.classes);
    for (int64_t first = int64_t{blockIdx.x} * kRows; first < given.rows; first += int64_t{gridDim.x} * kRows) {
        const bool own = first + place < given.rows;
        const int64_t n = own ? first + place : given.rows - 1;  // whoever has no row reads the last one too
        const T* __restrict__ row = static_cast<const T*>(given.outputs) + n * classes;
        uint64_t key = 0;
        float least = INFINITY;
        each<kMembers>(row, classes, member, [&](float score, int c) {
            key = max(key, key_of(score, c));
            least = fminf(least, score);
        });
        key = folded<kMembers>(key, [](uint64_t a, uint64_t b) { return max(a, b); });
        least = folded<kMembers>(least, [](float a, float b) { return fminf(a, b); });
        const float top = key == ~uint64_t{0} ? INFINITY : score_of(key);
        const bool valid = fabsf(top) < INFINITY;
        const int predicted = valid ? static_cast<int>(~static_cast<uint32_t>(key)) : kInvalid;
        if (own && member == 0) {
            found.predicted[n] = predicted;
        }
        if (given.expected == nullptr && found.levels == nullptr) {
            continue;
        }

        double total = 0.0;
        if (least >= 0.0f) {
            each<kMembers>(row, classes, member, [&](float score, int) { total += static_cast<double>(score); });
        }
        const bool distribution = least >= 0.0f && fabs(sum_of<kMembers>(total) - 1.0) <= 1e-3;
        const double highest = distribution ? log(static_cast<double>(top)) : static_cast<double>(top);
        const auto below = [&](float score) {
            return (distribution ? log(static_cast<double>(score)) : static_cast<double>(score)) - highest;
        };
        double count = 0.0, sum = 0.0, squares = 0.0;
        each<kMembers>(row, classes, member, [&](float score, int) {
            const double d = below(score);
            if (d > -INFINITY) {
                count += 1.0;
                sum += d;
                squares += d * d;
            }
        });
        count = sum_of<kMembers>(count);
        const double mean = sum_of<kMembers>(sum) / count;
        const double variance = sum_of<kMembers>(squares) / count - mean * mean;
        constexpr double most = kMostLevel;
        const double scale = variance > 0.0 ? 10.0 / sqrt(variance) : 0.0;

        for (int i = member; i < kLevels; i += kMembers) {
            histograms[place][i] = 0;
        }
        const int64_t label = given.expected == nullptr ? kInvalid : given.expected[n];
        if (own && member == 0 && given.expected != nullptr) {
            found.at[n] = 0;
            const int64_t group = given.group == nullptr ? 0 : given.group[n];
            if ((!valid || predicted == label) && group >= 0 && group < given.groups) {
                atomicAdd(valid ? &found.hits[group] : &found.invalid[group], 1);
            }
        }
        __syncthreads();
        each<kMembers>(row, classes, member, [&](float score, int c) {
            int level = 0;
            if (valid) {
                const double d = below(score);
                const double exact = d > -INFINITY ? (d - mean) * scale : -most;
                level = static_cast<int>(rint(fmin(fmax(exact, -most), most)));
            }
            atomicAdd(&histograms[place][level + kMostLevel], 1u);
            if (own && c == label) {
                found.at[n] = static_cast<int8_t>(level);
            }
            if (own && found.levels != nullptr) {
                found.levels[n * classes + c] = static_cast<int8_t>(level);
            }
        });
        __syncthreads();
        if (own && given.expected != nullptr) {
            for (int i = member; i < kLevels; i += kMembers) {
                found.histogram[n * kLevels + i] = histograms[place][i];
            }
        }
    }
}

template <typename T>
void launch(const Matching& given, const Matches& found, cudaStream_t stream) {
    if (given.classes < kLongRow) {
        match_kernel<T, kLanes><<<grid_for(given.rows, kThreads / kLanes), kThreads, 0, stream>>>(given, found);
    } else {
        match_kernel<T, kThreads><<<grid_for(given.rows, 1), kThreads, 0, stream>>>(given, found);
    }
}

}  // namespace

void match_counts(Place place, const Matching& given, const Matches& found) {
    if (given.rows < 0 || given.groups < 0 || given.classes < 1 || given.classes > INT_MAX - kThreads) {
        throw std::invalid_argument("outputs is [" + std::to_string(given.rows) + ", " + std::to_string(given.classes) +
                                    "] and there are " + std::to_string(given.groups) +
                                    " groups: sizes must not be negative, and classes from 1 to 2^31");
    }
    const DeviceGuard guard(place.device, "match_counts");
    const cudaStream_t stream = stream_of(place);
    for (int32_t* counts : {found.hits, found.invalid}) {
        if (counts != nullptr) {
            const size_t bytes = static_cast<size_t>(given.groups) * sizeof(int32_t);
            check(cudaMemsetAsync(counts, 0, bytes, stream), "match_counts");
        }
    }
    if (given.rows == 0) {
        return;
    }
    switch (given.scalar) {
        case Scalar::kFloat32:
            launch<float>(given, found, stream);
            break;
        case Scalar::kFloat16:
            launch<__half>(given, found, stream);
            break;
        case Scalar::kBfloat16:
            launch<__nv_bfloat16>(given, found, stream);
            break;
    }
    check(cudaGetLastError(), "match_counts");
}

}  // namespace wmengine::cuda
