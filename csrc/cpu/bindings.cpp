// The Python module `_cpu`: raw pointers and sizes in, nothing allocated for the caller, the GIL released around the
// work.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cross_entropy.h"
#include "embedding.h"
#include "match_counts.h"
#include "matches.h"
#include "simd.h"
#include "threads.h"

namespace py = pybind11;
using namespace wmengine;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// (values, gradient, filters, size, channels, key); a bare vector of M weights is one filter of size M.
using WeightTuple = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t, uint64_t>;

std::vector<Weight> weights_of(const std::vector<WeightTuple>& tuples) {
    std::vector<Weight> weights;
    weights.reserve(tuples.size());
    for (const auto& [values, gradient, filters, size, channels, key] : tuples) {
        weights.push_back({pointer<const float>(values), pointer<float>(gradient), filters, size, channels, key});
    }
    return weights;
}

// Fresh memory that is about to be written whole: a large page costs one fault where small ones cost 512.
void use_large_pages(uintptr_t address, uint64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t size = 2 << 20;
    const uintptr_t begin = (address + size - 1) / size * size, end = (address + bytes) / size * size;
    if (begin < end) {
        madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a kernel without them may refuse
    }
#endif
}

CrossEntropyProblem cross_entropy_problem(uintptr_t logits, int stored, int64_t rows, int64_t classes, int64_t stride,
                                          uintptr_t labels, uintptr_t weight, double label_smoothing,
                                          int64_t ignore_index, uintptr_t group, int64_t groups) {
    return {pointer<const void>(logits),
            static_cast<Stored>(stored),
            rows,
            classes,
            stride,
            pointer<const int64_t>(labels),
            pointer<const float>(weight),
            pointer<const int64_t>(group),
            groups,
            label_smoothing,
            ignore_index};
}

struct NamedLevel {
    const char* name;
    Level level;
};

// Every instruction set that this processor has, the plainest first.
std::vector<NamedLevel> levels() {
#if defined(WM_X86_64)
    std::vector<NamedLevel> all{{"x86-64", Level::kBaseline}, {"x86-64-v3", Level::kV3}, {"x86-64-v4", Level::kV4}};
    all.resize(static_cast<size_t>(best_level()) + 1);
    return all;
#elif defined(__aarch64__)
    return {{"aarch64", Level::kBaseline}};
#else
    return {{"generic", Level::kBaseline}};
#endif
}

std::string instruction_set() { return levels()[static_cast<size_t>(level())].name; }

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const NamedLevel& each : levels()) {
        names.push_back(each.name);
    }
    return names;
}

void set_instruction_set(const std::string& name) {
    std::string known;
    for (const NamedLevel& each : levels()) {
        if (name == each.name) {
            set_level(each.level);
            return;
        }
        known += (known.empty() ? "" : ", ") + std::string(each.name);
    }
    throw std::invalid_argument("instruction set '" + name + "' is not one of this processor's: " + known);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "wmengine's operators on CPUs";
    if (const char* name = std::getenv("WMENGINE_INSTRUCTION_SET")) {
        try {
            set_instruction_set(name);
        } catch (const std::invalid_argument& error) {
            throw py::import_error(std::string("WMENGINE_INSTRUCTION_SET: ") + error.what());
        }
    }
    m.def("instruction_set", &instruction_set);
    m.def("instruction_sets", &instruction_sets);
    m.def("set_instruction_set", &set_instruction_set, py::arg("name"));
    m.def("thread_count", &thread_count);
    m.def("set_thread_count", &set_thread_count, py::arg("count"));

    m.def("use_large_pages", &use_large_pages, py::arg("address"), py::arg("bytes"));

    m.def(
        "carrier_projection",
        [](const std::vector<WeightTuple>& weights, int carrier, int projection, int64_t total, double scale,
           uintptr_t signs, uintptr_t inverse_norms, uintptr_t y) {
            const std::vector<Weight> list = weights_of(weights);
            py::gil_scoped_release release;
            carrier_projection(list, static_cast<Carrier>(carrier), static_cast<Projection>(projection), total, scale,
                               pointer<const float>(signs), pointer<float>(inverse_norms), pointer<float>(y));
        },
        py::arg("weights"), py::arg("carrier"), py::arg("projection"), py::arg("total"), py::arg("scale"),
        py::arg("signs"), py::arg("inverse_norms"), py::arg("y"));
    m.def(
        "link_loss",
        [](uintptr_t y, uintptr_t bits, int64_t total, int link, double margin, uintptr_t residual) {
            for (int64_t t = 0; t < total; ++t) {
                if (pointer<const uint8_t>(bits)[t] > 1) {
                    throw std::invalid_argument("bits must hold 0 and 1 only, and bit " + std::to_string(t) +
                                                " does not");
                }
            }
            return link_loss(pointer<const float>(y), pointer<const uint8_t>(bits), total, static_cast<Link>(link),
                             margin, pointer<float>(residual));
        },
        py::arg("y"), py::arg("bits"), py::arg("total"), py::arg("link"), py::arg("margin"), py::arg("residual"));
    m.def(
        "embedding_backward",
        [](const std::vector<WeightTuple>& weights, int carrier, int projection, int64_t total, double factor,
           uintptr_t inverse_norms, uintptr_t residual) {
            const std::vector<Weight> list = weights_of(weights);
            py::gil_scoped_release release;
            embedding_backward(list, static_cast<Carrier>(carrier), static_cast<Projection>(projection), total, factor,
                               pointer<const float>(inverse_norms), pointer<const float>(residual));
        },
        py::arg("weights"), py::arg("carrier"), py::arg("projection"), py::arg("total"), py::arg("factor"),
        py::arg("inverse_norms"), py::arg("residual"));
    m.def(
        "projection_adjoint",
        [](uintptr_t g, int64_t total, int64_t count, uint64_t key, int projection, double factor, bool accumulate,
           uintptr_t out) {
            py::gil_scoped_release release;
            projection_adjoint(pointer<const float>(g), total, count, key, static_cast<Projection>(projection), factor,
                               accumulate, pointer<float>(out));
        },
        py::arg("g"), py::arg("total"), py::arg("count"), py::arg("key"), py::arg("projection"), py::arg("factor"),
        py::arg("accumulate"), py::arg("out"));
    m.def(
        "marked_cross_entropy",
        [](uintptr_t logits, int stored, int64_t rows, int64_t classes, int64_t stride, uintptr_t labels,
           uintptr_t weight, uintptr_t group, int64_t groups, double label_smoothing, int64_t ignore_index, bool mean,
           uintptr_t loss, uintptr_t group_loss, uintptr_t group_hits, uintptr_t normalizers, uintptr_t denominator,
           uintptr_t gradient) {
            const CrossEntropyProblem problem = cross_entropy_problem(
                logits, stored, rows, classes, stride, labels, weight, label_smoothing, ignore_index, group, groups);
            const int64_t bad = first_bad_row(problem);
            if (bad >= 0) {
                const int64_t bad_group = problem.group != nullptr ? problem.group[bad] : 0;
                throw std::invalid_argument(
                    "row " + std::to_string(bad) + " has label " + std::to_string(problem.labels[bad]) + " and group " +
                    std::to_string(bad_group) + "; labels must be 0.." + std::to_string(classes - 1) +
                    " or ignore_index, groups 0.." + std::to_string(groups - 1));
            }
            py::gil_scoped_release release;
            marked_cross_entropy(problem, mean,
                                 {pointer<float>(loss), pointer<float>(group_loss), pointer<int64_t>(group_hits),
                                  pointer<float>(normalizers), pointer<float>(denominator), pointer<void>(gradient)});
        },
        py::arg("logits"), py::arg("stored"), py::arg("rows"), py::arg("classes"), py::arg("stride"), py::arg("labels"),
        py::arg("weight"), py::arg("group"), py::arg("groups"), py::arg("label_smoothing"), py::arg("ignore_index"),
        py::arg("mean"), py::arg("loss"), py::arg("group_loss"), py::arg("group_hits"), py::arg("normalizers"),
        py::arg("denominator"), py::arg("gradient"));
    m.def(
        "marked_cross_entropy_backward",
        [](uintptr_t logits, int stored, int64_t rows, int64_t classes, int64_t stride, uintptr_t labels,
           uintptr_t weight, double label_smoothing, int64_t ignore_index, double factor, uintptr_t normalizers,
           uintptr_t gradient) {
            const CrossEntropyProblem problem = cross_entropy_problem(logits, stored, rows, classes, stride, labels,
                                                                      weight, label_smoothing, ignore_index, 0, 1);
            py::gil_scoped_release release;
            marked_cross_entropy_backward(problem, factor, pointer<const float>(normalizers), pointer<void>(gradient));
        },
        py::arg("logits"), py::arg("stored"), py::arg("rows"), py::arg("classes"), py::arg("stride"), py::arg("labels"),
        py::arg("weight"), py::arg("label_smoothing"), py::arg("ignore_index"), py::arg("factor"),
        py::arg("normalizers"), py::arg("gradient"));
    m.def(
        "match_counts",
        [](uintptr_t scores, int stored, int64_t rows, int64_t classes, uintptr_t expected, uintptr_t group,
           int64_t groups, uintptr_t predicted, uintptr_t at, uintptr_t histogram, uintptr_t hits, uintptr_t invalid,
           uintptr_t levels) {
            py::gil_scoped_release release;
            match_counts({pointer<const void>(scores), static_cast<Stored>(stored), rows, classes,
                          pointer<const int64_t>(expected), pointer<const int64_t>(group), groups},
                         {pointer<int32_t>(predicted), pointer<int8_t>(at), pointer<uint32_t>(histogram),
                          pointer<int32_t>(hits), pointer<int32_t>(invalid), pointer<int8_t>(levels)});
        },
        py::arg("scores"), py::arg("stored"), py::arg("rows"), py::arg("classes"), py::arg("expected"),
        py::arg("group"), py::arg("groups"), py::arg("predicted"), py::arg("at"), py::arg("histogram"), py::arg("hits"),
        py::arg("invalid"), py::arg("levels"));
    m.def(
        "label_matches",
        [](uintptr_t predicted, int64_t suspects, uintptr_t expected, int64_t sets, int64_t places, bool wide,
           int64_t largest, uintptr_t counts) {
            py::gil_scoped_release release;
            if (wide) {
                label_matches(pointer<const int64_t>(predicted), suspects, pointer<const int64_t>(expected), sets,
                              places, largest, pointer<int32_t>(counts));
            } else {
                label_matches(pointer<const int32_t>(predicted), suspects, pointer<const int32_t>(expected), sets,
                              places, largest, pointer<int32_t>(counts));
            }
        },
        py::arg("predicted"), py::arg("suspects"), py::arg("expected"), py::arg("sets"), py::arg("places"),
        py::arg("wide"), py::arg("largest"), py::arg("counts"));
    m.def(
        "bit_matches",
        [](uintptr_t messages, int64_t suspects, uintptr_t registry, int64_t rows, int64_t total, uintptr_t counts) {
            py::gil_scoped_release release;
            bit_matches({pointer<const uint8_t>(messages), suspects, total},
                        {pointer<const uint8_t>(registry), rows, total}, pointer<int32_t>(counts));
        },
        py::arg("messages"), py::arg("suspects"), py::arg("registry"), py::arg("rows"), py::arg("total"),
        py::arg("counts"));
    m.def(
        "best_bit_matches",
        [](uintptr_t messages, int64_t suspects, uintptr_t registry, int64_t rows, int64_t total, int64_t best,
           uintptr_t counts, uintptr_t indices) {
            py::gil_scoped_release release;
            best_bit_matches({pointer<const uint8_t>(messages), suspects, total},
                             {pointer<const uint8_t>(registry), rows, total}, best, pointer<int32_t>(counts),
                             pointer<int64_t>(indices));
        },
        py::arg("messages"), py::arg("suspects"), py::arg("registry"), py::arg("rows"), py::arg("total"),
        py::arg("best"), py::arg("counts"), py::arg("indices"));
}
