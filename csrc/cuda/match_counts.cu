// The class and the levels of every row of scores: a few lanes, a warp or a thread block a row, by its length.
//
// A row is read in lines of 16 bytes for its highest score, its mean and its deviation, and again for its levels; of a
// distribution the logarithms have a pass of their own. The later passes go backwards: what was read last is the
// likeliest to be in a cache still. Sums are of doubles, in one order, and of differences from one of the row's scores:
// what is equal adds up to 0, and no square of a mean can drown the deviation.
//
// A level is found in float32, and once more in double where it falls so close to an edge of rounding that the float32
// could be on the wrong side. Levels are counted in shared memory.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "launch.h"

namespace wmengine::cuda {
namespace {

constexpr int kThreads = 256;      // of a block whose warps have rows of their own
constexpr int kMostThreads = 512;  // of a row
constexpr int kInvalid = -1;
constexpr int kMostLevel = 30, kLevels = 2 * kMostLevel + 1;
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer, ties to even

template <int kMembers>
constexpr int kBlock = kMembers > kLanes ? kMembers : kThreads;  // threads of a block

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// f(scores, the class of the first) for what thread `member` of `kMembers` sees of a row: whole lines of 16 bytes, then
// single scores of the ends. All calls in one direction give a thread the same scores.
template <int kMembers, bool kBackwards = false, int kUnrolled = 4, typename T, typename F>
__device__ __forceinline__ void each(const T* __restrict__ row, int classes, int member, F f) {
    constexpr int kLine = 16 / sizeof(T);
    const int behind = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    const int head = min(behind == 0 ? 0 : kLine - behind, classes);
    const int lines = (classes - head) / kLine;
    const uint4* __restrict__ body = reinterpret_cast<const uint4*>(row + head);
#pragma unroll kUnrolled
    for (int i = member; i < lines; i += kMembers) {
        const int at = kBackwards ? lines - 1 - i : i;
        union {
            uint4 bits;
            uint32_t words[4];
            T values[kLine];
        } line;
        line.bits = __ldg(body + at);
        float scores[kLine];
#pragma unroll
        for (int j = 0; j < kLine; ++j) {
            if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // its bits are the upper half of a float's
                const uint32_t pair = line.words[j / 2];
                scores[j] = __uint_as_float(j % 2 == 0 ? pair << 16 : pair & 0xFFFF0000u);
            } else {
                scores[j] = to_float(line.values[j]);
            }
        }
        f(scores, head + at * kLine);
    }
#pragma unroll 1
    for (int i = member; i < classes - lines * kLine; i += kMembers) {
        const int c = i < head ? i : i + lines * kLine;
        const float scores[] = {to_float(row[c])};
        f(scores, c);
    }
}

// Threads that share rows: what they count in shared memory is behind a barrier of theirs.
template <int kMembers>
__device__ __forceinline__ void synchronize() {
    if constexpr (kMembers > kLanes) {
        __syncthreads();
    } else {
        __syncwarp();
    }
}

// What passes over a row add up. `line` is the class of the first score of the line that `top` is first seen in.
struct Sums {
    double sum, squares;
    float top, least;
    int line, count;

    __device__ __forceinline__ static Sums none() { return {0.0, 0.0, -INFINITY, INFINITY, INT_MAX, 0}; }

    __device__ __forceinline__ void add(double difference) {
        sum += difference;
        squares = fma(difference, difference, squares);
    }

    __device__ __forceinline__ void fold(const Sums& other) {
        count += other.count;
        sum += other.sum;
        squares += other.squares;
        line = other.top > top || (other.top == top && other.line < line) ? other.line : line;
        top = fmaxf(top, other.top);
        least = fminf(least, other.least);
    }
};

// Folds over `kMembers` <= 32 neighbouring lanes, with the same bits for all of them. Of the first pass's sums `count`
// is 0, of the others' the extremes are those of none.
template <int kMembers, bool kFirst>
__device__ __forceinline__ void fold_lanes(Sums& sums) {
#pragma unroll
    for (int step = kMembers / 2; step > 0; step >>= 1) {
        Sums other = Sums::none();
        other.sum = __shfl_xor_sync(kFullWarp, sums.sum, step);
        other.squares = __shfl_xor_sync(kFullWarp, sums.squares, step);
        if constexpr (kFirst) {
            other.top = __shfl_xor_sync(kFullWarp, sums.top, step);
            other.least = __shfl_xor_sync(kFullWarp, sums.least, step);
            other.line = __shfl_xor_sync(kFullWarp, sums.line, step);
        } else {
            other.count = __shfl_xor_sync(kFullWarp, sums.count, step);
        }
        sums.fold(other);
    }
}

// Folds over the members of a row; every thread of the block calls it.
template <int kMembers, bool kFirst>
__device__ __forceinline__ void fold_members(Sums& sums) {
    constexpr int kInWarp = kMembers < kLanes ? kMembers : kLanes;
    fold_lanes<kInWarp, kFirst>(sums);
    if constexpr (kMembers > kLanes) {
        constexpr int kWarps = kMembers / kLanes;
        __shared__ Sums parts[kWarps];
        if (threadIdx.x % kLanes == 0) {
            parts[threadIdx.x / kLanes] = sums;
        }
        __syncthreads();
        sums = parts[threadIdx.x % kWarps];
        __syncthreads();
        fold_lanes<kWarps, kFirst>(sums);
    }
}

// The score as it is: what a level is found of where scores are no distribution.
struct Same {
    __device__ __forceinline__ float operator()(float score) const { return score; }
};

// ln(p / top) of 0 <= p <= top, within 2^-21 of itself; all it does is exact or rounded as IEEE 754 has it.
//
// p = 2^k u with u from 2/3 to 4/3 of top, so that u - top is exact, and so is what is 0.
class Logarithm {
public:
    __device__ __forceinline__ explicit Logarithm(float top) {
        top_ = top * kNormal;
        inverse_ = 1.0f / top_;
        low_ = __float_as_uint(top_ * (2.0f / 3.0f));
    }

    __device__ __forceinline__ float operator()(float p) const {
        const uint32_t bits = __float_as_uint(p * kNormal), exponent = (bits - low_) & 0xFF800000u;
        const float k = p > 0.0f ? static_cast<float>(static_cast<int32_t>(exponent)) : -INFINITY;  // times 2^23
        const float t = (__uint_as_float(bits - exponent) - top_) * inverse_;
        float series = 0.14026251f;  // ln(1 + t) = t + t^2 series
#pragma unroll
        for (float term :
             {-0.15388559f, 0.13995828f, -0.16415957f, 0.20011167f, -0.2500782f, 0.33333197f, -0.49999937f}) {
            series = fmaf(series, t, term);
        }
        return fmaf(k, 0.69314718f * 0x1p-23f, fmaf(t * t, series, t));
    }

private:
    static constexpr float kNormal = 0x1p64f;  // times a subnormal is normal

    float top_, inverse_;
    uint32_t low_;
};

// The level of z: 10 (z - shift - mean) / deviation, rounded to even and cut at 30 on either side; 30 is added to it,
// so that it is a column of the histogram.
//
// In float32 it is 60 w with w = (z - center) scale / 60 + offset, cut to 0 ... 1. With |rest| <= 16 and a level of at
// most 30.5 the product is at most 46.5 / 60, and 60 w is wrong by less than (2 * 46.5 + 46 + 30 + 1) 2^-24 < 2^-16:
// two roundings of the product's factors, one of the offset, one of w, and what doubles of at most 2^28 are wrong by.
// So it is on the right side of an edge which is 2^-16 away or more; and what is cut is wrong by as little or far past
// the last edge.
class Rule {
public:
    // `share` is 1 over the number of scores.
    __device__ __forceinline__ Rule(const Sums& sums, double share, double shift)
        : shift_(shift), mean_(sums.sum * share) {
        constexpr double kUnit = 1.0 / (2.0 * kMostLevel);
        const double variance = sums.squares * share - mean_ * mean_;
        scale_ = variance > 0.0 ? 10.0 / sqrt(variance) : 0.0;
        const double middle = shift + mean_;
        center_ = static_cast<float>(middle);
        const double rest = (center_ - middle) * scale_;
        factor_ = static_cast<float>(scale_ * kUnit);
        offset_ = static_cast<float>(0.5 + rest * kUnit);
        const bool fits = scale_ >= 1e-30 && scale_ <= 1e30 && fabs(rest) <= 16.0 && fabs(middle) * scale_ <= 0x1p28;
        most_ = fits ? 0.5f - 0x1p-16f : -1.0f;
    }

    // Sets how far the level lies from the integer that is returned.
    __device__ __forceinline__ int quick(float z, float& off) const {
        const float w = __saturatef(fmaf(z - center_, factor_, offset_));  // NaN becomes 0
        const float rounded = fmaf(w, 2.0f * kMostLevel, kRounder);
        off = fabsf(fmaf(w, 2.0f * kMostLevel, kRounder - rounded));
        return static_cast<int>(__float_as_uint(rounded) - __float_as_uint(kRounder));
    }

    __device__ __forceinline__ bool sure(float off) const { return off <= most_; }

    __device__ __forceinline__ int exact(float z) const {
        constexpr double most = kMostLevel;
        const double level = z > -INFINITY ? (z - shift_ - mean_) * scale_ : -most;
        return static_cast<int>(rint(fmin(fmax(level, -most), most))) + kMostLevel;
    }

private:
    double shift_, mean_, scale_;
    float center_, factor_, offset_, most_;
};

// Levels of a thread's scores, into the row's histogram and, unless that is null, to the row's levels.
template <int kMembers, typename T, typename Z>
__device__ __forceinline__ void find_levels(const T* __restrict__ row, int classes, int member, const Z& z,
                                            const Rule& rule, uint32_t* histogram, int8_t* __restrict__ levels) {
    float farthest = 0.0f;
    each<kMembers, true>(row, classes, member, [&](const auto& scores, int first) {
        constexpr int kCount = sizeof(scores) / sizeof(float);
        uint64_t bytes = 0;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            float off;
            const int level = rule.quick(z(scores[i]), off);
            farthest = fmaxf(farthest, off);
            atomicAdd(&histogram[level], 1u);
            bytes |= uint64_t{static_cast<uint8_t>(level - kMostLevel)} << (8 * i);
        }
        if (levels != nullptr) {
            int8_t* to = levels + first;
            if (kCount == 8 && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
                *reinterpret_cast<uint64_t*>(to) = bytes;
            } else if (kCount == 4 && reinterpret_cast<uintptr_t>(to) % 4 == 0) {
                *reinterpret_cast<uint32_t*>(to) = static_cast<uint32_t>(bytes);
            } else {
#pragma unroll
                for (int i = 0; i < kCount; ++i) {
                    to[i] = static_cast<int8_t>(bytes >> (8 * i));
                }
            }
        }
    });
    if (rule.sure(farthest)) {
        return;
    }
    each<kMembers, true, 1>(row, classes, member, [&](const auto& scores, int first) {
        constexpr int kCount = sizeof(scores) / sizeof(float);
#pragma unroll 1
        for (int c = first; c < first + kCount; ++c) {
            const float score = z(to_float(row[c]));
            float off;
            const int level = rule.quick(score, off);
            if (!rule.sure(off)) {
                const int exact = rule.exact(score);
                atomicAdd(&histogram[level], ~0u);  // takes it back
                atomicAdd(&histogram[exact], 1u);
                if (levels != nullptr) {
                    levels[c] = static_cast<int8_t>(exact - kMostLevel);
                }
            }
        }
    });
}

// Sums of what is above -Inf, of differences from `shift`; NaN and +Inf make the sum NaN.
template <int kMembers, typename T, typename Z>
__device__ __forceinline__ void add_present(const T* __restrict__ row, int classes, int member, const Z& z,
                                            double shift, Sums& sums) {
    each<kMembers, true>(row, classes, member, [&](const auto& scores, int) {
#pragma unroll
        for (float score : scores) {
            const float value = z(score);
            if (value != -INFINITY) {
                ++sums.count;
                sums.add(value - shift);
            }
        }
    });
}

template <typename T, int kMembers>
__global__ void __launch_bounds__(kBlock<kMembers>, 1024 / kBlock<kMembers>)
    match_kernel(Matching given, Matches found) {
    constexpr int kRows = kBlock<kMembers> / kMembers;
    constexpr int kTeam = kMembers < kLanes ? kLanes : kMembers;  // threads that share rows
    constexpr int kTeamRows = kTeam / kMembers;
    alignas(16) __shared__ uint32_t histograms[kRows * kLevels];
    const int member = threadIdx.x % kMembers, place = threadIdx.x / kMembers;
    const int mate = threadIdx.x % kTeam, team = threadIdx.x / kTeam;
    const int classes = static_cast<int>(given.classes);
    const double whole = 1.0 / classes;
    uint32_t* const shared = histograms + team * kTeamRows * kLevels;
    uint32_t* const histogram = histograms + place * kLevels;
    for (int i = mate; i < kTeamRows * kLevels; i += kTeam) {
        shared[i] = 0;
    }
    int hits = 0, invalid = 0;  // of the only group: additions to one address would wait for each other
    for (int64_t first = int64_t{blockIdx.x} * kRows; first < given.rows; first += int64_t{gridDim.x} * kRows) {
        const bool own = first + place < given.rows;
        const int64_t n = own ? first + place : given.rows - 1;  // whoever has no row reads the last one too
        const T* __restrict__ row = static_cast<const T*>(given.outputs) + n * classes;
        Sums sums = Sums::none();
        double shift = to_float(row[0]);
        each<kMembers>(row, classes, member, [&](const auto& scores, int line) {
            float high = scores[0];
#pragma unroll
            for (float score : scores) {
                high = fmaxf(high, score);
                sums.least = fminf(sums.least, score);
                sums.add(score - shift);
            }
            // Lines come in order; the single scores of the ends come after them.
            const bool single = sizeof(scores) == sizeof(float);
            if (high > sums.top || (single && high == sums.top && line < sums.line)) {
                sums.top = high;
                sums.line = line;
            }
        });
        fold_members<kMembers, true>(sums);
        const float top = sums.top;
        const int line = sums.line;
        const bool distribution = sums.least >= 0.0f && fabs(sums.sum + shift * classes - 1.0) <= 1e-3;
        const bool again = distribution || !(fabs(sums.sum) < INFINITY);
        double share = whole;
        if (__any_sync(kFullWarp, again)) {
            Sums present = Sums::none();
            if (distribution) {
                add_present<kMembers>(row, classes, member, Logarithm(top), 0.0, present);
            } else {
                add_present<kMembers>(row, classes, member, Same{}, top, present);
            }
            fold_members<kMembers, false>(present);
            if (again) {
                sums = present;
                share = 1.0 / present.count;
                shift = distribution ? 0.0 : top;
            }
        }
        const bool valid = top > -INFINITY && fabs(sums.sum) < INFINITY;
        int predicted = kInvalid;
        if (own && member == 0) {
            if (valid) {
                for (predicted = line; to_float(row[predicted]) != top;) {
                    ++predicted;
                }
            }
            found.predicted[n] = predicted;
        }
        if (given.expected == nullptr && found.levels == nullptr) {
            continue;
        }

        synchronize<kMembers>();
        const Rule rule(sums, share, shift);
        int8_t* const levels = own && found.levels != nullptr ? found.levels + n * classes : nullptr;
        if (!valid) {
            for (int c = member; levels != nullptr && c < classes; c += kMembers) {
                levels[c] = 0;
            }
            if (member == 0) {
                histogram[kMostLevel] = static_cast<uint32_t>(classes);
            }
        } else if (distribution) {
            find_levels<kMembers>(row, classes, member, Logarithm(top), rule, histogram, levels);
        } else {
            find_levels<kMembers>(row, classes, member, Same{}, rule, histogram, levels);
        }
        if (own && member == 0 && given.expected != nullptr) {
            const int64_t label = given.expected[n];
            int at = 0;
            if (valid && label >= 0 && label < classes) {
                const float score = to_float(row[label]);
                at = rule.exact(distribution ? Logarithm(top)(score) : score) - kMostLevel;
            }
            found.at[n] = static_cast<int8_t>(at);
            if (given.group == nullptr) {
                hits += valid && predicted == label;
                invalid += !valid;
            } else if (!valid || predicted == label) {
                const int64_t group = given.group[n];
                if (group >= 0 && group < given.groups) {
                    atomicAdd(valid ? &found.hits[group] : &found.invalid[group], 1);
                }
            }
        }
        synchronize<kMembers>();
        const int64_t team_first = first + team * kTeamRows;
        uint32_t* const to = found.histogram + team_first * kLevels;
        const int64_t rows = given.expected == nullptr ? 0 : min(given.rows - team_first, int64_t{kTeamRows});
        if (kTeamRows % 4 == 0 && rows == kTeamRows && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
#pragma unroll 4
            for (int i = mate; i < kTeamRows * kLevels / 4; i += kTeam) {
                uint4* const line = reinterpret_cast<uint4*>(shared) + i;
                reinterpret_cast<uint4*>(to)[i] = *line;
                *line = {0, 0, 0, 0};
            }
        } else {
            const int here = static_cast<int>(rows) * kLevels;
            for (int i = mate; i < kTeamRows * kLevels; i += kTeam) {
                if (i < here) {
                    to[i] = shared[i];
                }
                shared[i] = 0;
            }
        }
    }
    if (given.group == nullptr && given.groups > 0) {
        hits = __reduce_add_sync(kFullWarp, hits);
        invalid = __reduce_add_sync(kFullWarp, invalid);
        if (threadIdx.x % kLanes == 0 && hits > 0) {
            atomicAdd(found.hits, hits);
        }
        if (threadIdx.x % kLanes == 0 && invalid > 0) {
            atomicAdd(found.invalid, invalid);
        }
    }
}

template <typename T, int kMembers>
void launch(const Matching& given, const Matches& found, cudaStream_t stream) {
    match_kernel<T, kMembers>
        <<<grid_for(given.rows, kBlock<kMembers> / kMembers), kBlock<kMembers>, 0, stream>>>(given, found);
}

// So many members that each has some lines, and that the rows which a multiprocessor has begun fit into its caches.
template <typename T>
void launch(const Matching& given, const Matches& found, cudaStream_t stream) {
    const int64_t bytes = given.classes * static_cast<int64_t>(sizeof(T));
    if (bytes <= 128) {
        launch<T, 2>(given, found, stream);
    } else if (bytes <= 2048) {
        launch<T, 8>(given, found, stream);
    } else if (bytes <= 4096) {
        launch<T, 16>(given, found, stream);
    } else if (bytes <= 12288) {
        launch<T, kLanes>(given, found, stream);
    } else if (bytes <= 32768) {
        launch<T, 128>(given, found, stream);
    } else if (bytes <= 65536) {
        launch<T, 256>(given, found, stream);
    } else {
        launch<T, kMostThreads>(given, found, stream);
    }
}

}  // namespace

void match_counts(Place place, const Matching& given, const Matches& found) {
    if (given.rows < 0 || given.groups < 0 || given.classes < 1 || given.classes > INT_MAX - kMostThreads) {
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
