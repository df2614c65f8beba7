// wmengine._cuda: the GPU operators for Python. Device pointers and streams are integers; the GIL is released.
#include <pybind11/pybind11.h>

#include "ops.h"

namespace py = pybind11;

namespace {

using wmengine::cuda::Integer;
using wmengine::cuda::Place;
using wmengine::cuda::Scalar;

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Scalar scalar_of(int code) {
    if (code < 0 || code > 2) {
        throw py::value_error("dtype is " + std::to_string(code) +
                              ": it must be 0 (float32), 1 (float16) or 2 (bfloat16)");
    }
    return static_cast<Scalar>(code);
}

Integer integer_of(int code) {
    if (code != 0 && code != 1) {
        throw py::value_error("dtype is " + std::to_string(code) + ": it must be 0 (int32) or 1 (int64)");
    }
    return static_cast<Integer>(code);
}

void match_counts(int device, uintptr_t stream, uintptr_t outputs, int dtype, int64_t rows, int64_t classes,
                  uintptr_t expected, uintptr_t group, int64_t groups, uintptr_t predicted, uintptr_t at,
                  uintptr_t histogram, uintptr_t hits, uintptr_t invalid, uintptr_t levels) {
    wmengine::cuda::match_counts(Place{device, stream},
                                 {pointer<const void>(outputs), scalar_of(dtype), rows, classes,
                                  pointer<const int64_t>(expected), pointer<const int64_t>(group), groups},
                                 {pointer<int32_t>(predicted), pointer<int8_t>(at), pointer<uint32_t>(histogram),
                                  pointer<int32_t>(hits), pointer<int32_t>(invalid), pointer<int8_t>(levels)});
}

void label_matches(int device, uintptr_t stream, uintptr_t predicted, int dtype, int64_t suspects, int64_t rows,
                   uintptr_t expected, int64_t sets, uintptr_t counts) {
    wmengine::cuda::label_matches(Place{device, stream}, pointer<const void>(predicted), integer_of(dtype), suspects,
                                  rows, pointer<const int64_t>(expected), sets, pointer<int32_t>(counts));
}

void bit_matches(int device, uintptr_t stream, uintptr_t messages, int64_t suspects, uintptr_t registry,
                 int64_t registered, int64_t total, uintptr_t counts) {
    wmengine::cuda::bit_matches(Place{device, stream}, pointer<const uint8_t>(messages), suspects,
                                pointer<const uint8_t>(registry), registered, total, pointer<int32_t>(counts));
}

void best_bit_matches(int device, uintptr_t stream, uintptr_t messages, int64_t suspects, uintptr_t registry,
                      int64_t registered, int64_t total, int64_t best, uintptr_t workspace, uintptr_t counts,
                      uintptr_t indices) {
    wmengine::cuda::best_bit_matches(Place{device, stream}, pointer<const uint8_t>(messages), suspects,
                                     pointer<const uint8_t>(registry), registered, total, best,
                                     pointer<uint64_t>(workspace), pointer<int32_t>(counts), pointer<int64_t>(indices));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    using py::arg;
    using Release = py::call_guard<py::gil_scoped_release>;
    module.doc() = "GPU operators on raw device pointers; csrc/cuda/ops.h says what each computes.";
    module.def("device_count", &wmengine::cuda::device_count, "Devices the driver shows; 0 without a driver.");
    module.def("match_counts", &match_counts, arg("device"), arg("stream"), arg("outputs"), arg("dtype"), arg("rows"),
               arg("classes"), arg("expected"), arg("group"), arg("groups"), arg("predicted"), arg("at"),
               arg("histogram"), arg("hits"), arg("invalid"), arg("levels"), Release(),
               "int32 predicted[rows] and int8 levels[rows, classes] (or 0); where int64 expected[rows] is not 0, int8 "
               "at[rows], uint32 histogram[rows, 61], int32 hits[groups] and invalid[groups] too. dtype 0 is float32, "
               "1 float16, 2 bfloat16; int64 group[rows] may be 0.");
    module.def("label_matches", &label_matches, arg("device"), arg("stream"), arg("predicted"), arg("dtype"),
               arg("suspects"), arg("rows"), arg("expected"), arg("sets"), arg("counts"), Release(),
               "int32 counts[suspects, sets]; predicted is [suspects, rows], dtype 0 int32 or 1 int64, expected "
               "int64[sets, rows].");
    module.def("bit_matches", &bit_matches, arg("device"), arg("stream"), arg("messages"), arg("suspects"),
               arg("registry"), arg("registered"), arg("total"), arg("counts"), Release(),
               "int32 counts[suspects, registered] of equal bits; rows of (total + 7) // 8 bytes, lowest bit first.");
    module.def("best_bit_matches_workspace", &wmengine::cuda::best_bit_matches_workspace, arg("suspects"),
               arg("registered"), arg("best"), "Integers of 64 bits of workspace that best_bit_matches needs.");
    module.def("best_bit_matches", &best_bit_matches, arg("device"), arg("stream"), arg("messages"), arg("suspects"),
               arg("registry"), arg("registered"), arg("total"), arg("best"), arg("workspace"), arg("counts"),
               arg("indices"), Release(),
               "int32 counts[suspects, best] and int64 indices[suspects, best], most equal bits first.");
}
