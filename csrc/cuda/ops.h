// The verification operators on an NVIDIA GPU: raw pointers, sizes and a stream in, nothing allocated, nothing awaited.
//
// Every pointer is device memory of `device`; work goes to `stream` of that device and the caller's current device is
// put back. A call returns as soon as its kernels are queued. Failures are std::invalid_argument (a size that makes no
// sense) or std::runtime_error (what CUDA said). No float atomics: the same input gives the same bits on every run and
// on every card. Nothing of CUDA or Python is included here, so that nvcc never reads pybind11 and g++ never reads
// CUDA.
#pragma once

#include <cstdint>

namespace wmengine::cuda {

// Where the work runs. `stream` is a cudaStream_t as an integer; 0 is the default stream.
struct Place {
    int device;
    uintptr_t stream;
};

enum class Scalar : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };
enum class Integer : int { kInt32 = 0, kInt64 = 1 };

// Rows of scores [rows, classes], and what is expected of them: labels are any integers, and a row of a group outside
// 0 … groups - 1 counts nowhere. `group` may be null, all rows are then of group 0.
struct Matching {
    const void* outputs;
    Scalar scalar;
    int64_t rows, classes;
    const int64_t* expected;
    const int64_t* group;
    int64_t groups;
};

// As wmengine/ops/reference.py says of match_counts; levels may be null. Where nothing is expected (null), only
// `predicted` and levels are written: a process that must not see labels needs no others.
struct Matches {
    int32_t* predicted;   // [rows]
    int8_t* at;           // [rows]
    uint32_t* histogram;  // [rows, 61]
    int32_t* hits;        // [groups]
    int32_t* invalid;     // [groups]
    int8_t* levels;       // [rows, classes]
};

void match_counts(Place place, const Matching& given, const Matches& found);

// counts[s, k] = places n of predicted[suspects, rows] that hold expected[k, n]; a negative label matches nothing.
void label_matches(Place place, const void* predicted, Integer integer, int64_t suspects, int64_t rows,
                   const int64_t* expected, int64_t sets, int32_t* counts);

// counts[s, k] = equal bits among the first `total` of messages[s] and registry[k]. Rows are ceil(total / 8) bytes, bit
// t in byte t / 8, the lowest first; what the last byte holds above `total` does not count.
void bit_matches(Place place, const uint8_t* messages, int64_t suspects, const uint8_t* registry, int64_t registered,
                 int64_t total, int32_t* counts);

// Keys of 8 bytes of workspace that `best_bit_matches` needs.
int64_t best_bit_matches_workspace(int64_t suspects, int64_t registered, int64_t best);

// The `best` <= 1024 of registry's counts for each message, most matches first, equal ones by index:
// counts[suspects, best] and indices[suspects, best].
void best_bit_matches(Place place, const uint8_t* messages, int64_t suspects, const uint8_t* registry,
                      int64_t registered, int64_t total, int64_t best, uint64_t* workspace, int32_t* counts,
                      int64_t* indices);

// Devices the driver shows; 0 where there is no driver.
int device_count();

}  // namespace wmengine::cuda
