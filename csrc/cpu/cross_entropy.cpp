// A row is cut into blocks of classes. A block gives its maximum and Σ exp(z - maximum) in one visit; the blocks of a
// row are put together in order, so the answer does not depend on who computed which. Then the gradient is written,
// w·(softmax − target). A row of one block keeps its exponentials until then, in the first-level cache; a longer one
// computes them again, which costs less than a trip of theirs to the second level. DRAM sees the logits once and the
// gradient once.
#include "cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "cross_entropy_blocks.h"
#include "half.h"
#include "simd.h"
#include "threads.h"

namespace wmengine {
namespace {

constexpr int64_t kBlock = 4096;  // classes; their exponentials take 16 kB
constexpr int64_t kTask = 32768;  // classes that a thread takes at a time, in whole rows or in blocks of one row

template <typename Memory>
typename Memory::Type* row_of(void* gradient, const CrossEntropyProblem& problem, int64_t row) {
    return static_cast<typename Memory::Type*>(gradient) + row * problem.classes;
}

template <typename Memory>
const typename Memory::Type* row_of(const CrossEntropyProblem& problem, int64_t row) {
    return static_cast<const typename Memory::Type*>(problem.logits) + row * problem.stride;
}

int64_t blocks_of(int64_t classes) { return (classes + kBlock - 1) / kBlock; }

// What is kept of every row until all are added up.
struct RowResults {
    double* loss;
    uint8_t* hit;
    float* normalizers;  // or null
};

double weight_of(const CrossEntropyProblem& problem, int64_t row) {
    if (problem.labels[row] == problem.ignore_index) {
        return 0;
    }
    return problem.weight != nullptr ? problem.weight[row] : 1.0;
}

template <typename Memory>
void write_ignored(int64_t row, typename Memory::Type* g, int64_t classes, const RowResults& results) {
    results.loss[row] = 0;
    results.hit[row] = 0;
    if (results.normalizers != nullptr) {
        results.normalizers[2 * row] = 0;
        results.normalizers[2 * row + 1] = 1;
    }
    std::fill(g, g + classes, typename Memory::Type{});
}

Slope slope_of(const CrossEntropyProblem& problem, double weight, double top, double exponentials) {
    const double even = problem.label_smoothing / static_cast<double>(problem.classes);
    return {static_cast<float>(top), static_cast<float>(weight / exponentials), static_cast<float>(weight * even),
            static_cast<float>(weight * (1.0 - problem.label_smoothing))};
}

// Puts the blocks of one row together: writes its results, returns what its gradient is made of.
template <typename Memory, Level level, int lanes>
WM_INLINE Slope finish_row(const CrossEntropyProblem& problem, int64_t row, const Block* blocks,
                           double inverse_denominator, const RowResults& results) {
    const auto* z = row_of<Memory>(problem, row);
    const int64_t count = blocks_of(problem.classes), label = problem.labels[row];
    float top = -kInfinity;
    for (int64_t b = 0; b < count; ++b) {
        top = blocks[b].maximum > top ? blocks[b].maximum : top;
    }
    double exponentials = 0, mean = 0;
    for (int64_t b = 0; b < count; ++b) {
        // A block of -inf only adds its sum of 0, also where all blocks are such and the difference is NaN.
        const float below = blocks[b].maximum - top;
        exponentials += blocks[b].exponentials * (below < 0 ? std::exp(double(below)) : 1.0);
        if (problem.label_smoothing != 0) {
            const double own = double(blocks[b].maximum) - top;  // a block of -inf has that mean already
            const int64_t size = std::min(kBlock, problem.classes - b * kBlock);
            mean += blocks[b].mean + (own < 0 ? own * double(size) / double(problem.classes) : 0.0);
        }
    }
    const float chosen = Memory::template read_one<level>(z + label);
    const double logarithm = std::log(exponentials), weight = weight_of(problem, row);
    double loss = logarithm + (double(top) - chosen);
    if (problem.label_smoothing != 0) {  // both parts are at least 0: neither takes from the other
        loss = (1.0 - problem.label_smoothing) * loss + problem.label_smoothing * (logarithm - mean);
    }
    results.loss[row] = weight * loss;
    if (results.normalizers != nullptr) {
        results.normalizers[2 * row] = top;
        results.normalizers[2 * row + 1] = static_cast<float>(exponentials);
    }
    // A hit is the first place of the maximum, in a row without NaN: that would have made the sum NaN.
    bool hit = chosen == top && exponentials >= 1;
    const int64_t own = label / kBlock;
    for (int64_t b = 0; b < own && hit; ++b) {
        hit = blocks[b].maximum < top;
    }
    if (hit && label > own * kBlock) {
        hit = maximum_over<Memory, level, lanes>(z + own * kBlock, label - own * kBlock) < top;
    }
    results.hit[row] = hit;
    return slope_of(problem, weight * inverse_denominator, top, exponentials);
}

// Classes first … last - 1 of one row.
template <typename Memory, bool kept, Level level, int lanes>
WM_INLINE void write_part(const CrossEntropyProblem& problem, int64_t row, int64_t first, int64_t last,
                          const Slope& slope, const float* exponentials, typename Memory::Type* g) {
    const auto* z = row_of<Memory>(problem, row);
    const int64_t label = problem.labels[row];
    if (slope.scale != slope.scale || slope.top != slope.top) {  // then all of it is NaN, whatever their payloads
        Memory::template write_one<level>(g + first, std::numeric_limits<float>::quiet_NaN());
        std::fill(g + first + 1, g + last, g[first]);
        return;
    }
    write_gradient<Memory, kept, level, lanes>(z + first, last - first, slope, exponentials, g + first);
    if (label >= first && label < last) {
        const float chosen = Memory::template read_one<level>(z + label);
        const float e = Exponential<level, lanes>::make()(spread<lanes>(chosen - slope.top))[0];
        Memory::template write_one<level>(g + label, (e * slope.scale - slope.offset) - slope.target);
    }
}

// Sixteen lanes are no use to a row that has fewer classes; without AVX2 a vector has four.
template <typename Kernel>
struct Fitting {
    template <Level level, typename... Arguments>
    WM_INLINE void run(CrossEntropyProblem problem, Arguments... arguments) {
        if constexpr (lanes_of(level) == 16) {
            if (problem.classes >= 16) {
                Kernel::template work<level, 16>(problem, arguments...);
                return;
            }
        }
        Kernel::template work<level, level == Level::kBaseline ? 4 : 8>(problem, arguments...);
    }
};

// Whole rows begin … end - 1, one after the other: results and, where it is wanted, gradient.
template <typename Memory, bool smoothing>
struct WholeRows {
    template <Level level, int lanes>
    WM_INLINE void work(const CrossEntropyProblem& problem, int64_t begin, int64_t end, double inverse_denominator,
                        Block* blocks, float* exponentials, RowResults results, void* gradient) {
        const int64_t classes = problem.classes;
        const float inverse_classes = 1.0f / static_cast<float>(classes);
        const bool wanted = gradient != nullptr, keep = wanted && classes <= kBlock;
        for (int64_t row = begin; row < end; ++row) {
            const auto* z = row_of<Memory>(problem, row);
            auto* g = wanted ? row_of<Memory>(gradient, problem, row) : nullptr;
            if (problem.labels[row] == problem.ignore_index) {
                write_ignored<Memory>(row, g, wanted ? classes : 0, results);
                continue;
            }
            if (keep) {
                blocks[0] = block_of<Memory, smoothing, true, level, lanes>(z, classes, inverse_classes, exponentials);
            } else {
                for (int64_t c = 0; c < classes; c += kBlock) {
                    blocks[c / kBlock] = block_of<Memory, smoothing, false, level, lanes>(
                        z + c, std::min(kBlock, classes - c), inverse_classes, nullptr);
                }
            }
            const Slope slope = finish_row<Memory, level, lanes>(problem, row, blocks, inverse_denominator, results);
            if (keep) {
                write_part<Memory, true, level, lanes>(problem, row, 0, classes, slope, exponentials, g);
            } else if (wanted) {
                write_part<Memory, false, level, lanes>(problem, row, 0, classes, slope, nullptr, g);
            }
        }
    }
};

// The blocks of classes first … last - 1 of one row.
template <typename Memory, bool smoothing>
struct PartOfRow {
    template <Level level, int lanes>
    WM_INLINE void work(const CrossEntropyProblem& problem, int64_t row, int64_t first, int64_t last, Block* blocks) {
        const float inverse_classes = 1.0f / static_cast<float>(problem.classes);
        for (int64_t c = first; c < last; c += kBlock) {
            blocks[c / kBlock] = block_of<Memory, smoothing, false, level, lanes>(
                row_of<Memory>(problem, row) + c, std::min(kBlock, last - c), inverse_classes, nullptr);
        }
    }
};

template <typename Memory>
struct FinishRow {
    template <Level level, int lanes>
    WM_INLINE void work(const CrossEntropyProblem& problem, int64_t row, const Block* blocks,
                        double inverse_denominator, RowResults results, Slope* slope) {
        *slope = finish_row<Memory, level, lanes>(problem, row, blocks, inverse_denominator, results);
    }
};

// The gradient of classes first … last - 1 of rows begin … end - 1, each with its slope.
template <typename Memory>
struct GradientPart {
    template <Level level, int lanes>
    WM_INLINE void work(const CrossEntropyProblem& problem, int64_t begin, int64_t end, int64_t first, int64_t last,
                        const Slope* slopes, void* gradient) {
        for (int64_t row = begin; row < end; ++row) {
            auto* g = row_of<Memory>(gradient, problem, row);
            if (problem.labels[row] == problem.ignore_index) {
                std::fill(g + first, g + last, typename Memory::Type{});
            } else {
                write_part<Memory, false, level, lanes>(problem, row, first, last, slopes[row], nullptr, g);
            }
        }
    }
};

template <typename Memory, bool smoothing>
void whole_rows(const CrossEntropyProblem& problem, double inverse_denominator, RowResults results, void* gradient) {
    const int64_t step = std::max<int64_t>(1, kTask / problem.classes);
    parallel_for((problem.rows + step - 1) / step, [&](int64_t part) {
        alignas(64) float exponentials[kBlock + 16];
        std::vector<Block> blocks(blocks_of(problem.classes));
        dispatch<Fitting<WholeRows<Memory, smoothing>>>(problem, part * step,
                                                        std::min(part * step + step, problem.rows), inverse_denominator,
                                                        blocks.data(), exponentials, results, gradient);
    });
}

// The gradient of all rows, in parts of rows or of one row.
template <typename Memory>
void write_gradients(const CrossEntropyProblem& problem, const Slope* slopes, void* gradient) {
    const int64_t rows = std::max<int64_t>(1, kTask / problem.classes), classes = std::min(kTask, problem.classes);
    const int64_t parts = (problem.classes + classes - 1) / classes;
    parallel_for((problem.rows + rows - 1) / rows * parts, [&](int64_t task) {
        const int64_t begin = task / parts * rows, first = task % parts * classes;
        dispatch<Fitting<GradientPart<Memory>>>(problem, begin, std::min(begin + rows, problem.rows), first,
                                                std::min(first + classes, problem.classes), slopes, gradient);
    });
}

// Few long rows: threads share a row, twice. Its blocks are those that one thread alone would have made.
template <typename Memory, bool smoothing>
void shared_rows(const CrossEntropyProblem& problem, double inverse_denominator, RowResults results, void* gradient) {
    const int64_t count = blocks_of(problem.classes), parts = (problem.classes + kTask - 1) / kTask;
    std::vector<Block> blocks(problem.rows * count);
    std::vector<Slope> slopes(problem.rows);
    parallel_for(problem.rows * parts, [&](int64_t task) {
        const int64_t row = task / parts, first = task % parts * kTask;
        if (problem.labels[row] != problem.ignore_index) {
            dispatch<Fitting<PartOfRow<Memory, smoothing>>>(
                problem, row, first, std::min(first + kTask, problem.classes), &blocks[row * count]);
        }
    });
    for (int64_t row = 0; row < problem.rows; ++row) {
        if (problem.labels[row] == problem.ignore_index) {
            write_ignored<Memory>(row, nullptr, 0, results);
        } else {
            dispatch<Fitting<FinishRow<Memory>>>(problem, row, &blocks[row * count], inverse_denominator, results,
                                                 &slopes[row]);
        }
    }
    if (gradient != nullptr) {
        write_gradients<Memory>(problem, slopes.data(), gradient);
    }
}

}  // namespace

int64_t first_bad_row(const CrossEntropyProblem& problem) {
    for (int64_t n = 0; n < problem.rows; ++n) {
        const int64_t label = problem.labels[n];
        const bool good_label = label == problem.ignore_index || (label >= 0 && label < problem.classes);
        const bool good_group =
            problem.group == nullptr || (problem.group[n] >= 0 && problem.group[n] < problem.groups);
        if (!good_label || !good_group) {
            return n;
        }
    }
    return -1;
}

void marked_cross_entropy(const CrossEntropyProblem& problem, bool mean, const CrossEntropyResult& result) {
    double denominator = 1;
    if (mean) {
        denominator = 0;
        for (int64_t n = 0; n < problem.rows; ++n) {
            denominator += weight_of(problem, n);
        }
    }
    std::vector<double> row_loss(problem.rows);
    std::vector<uint8_t> row_hit(problem.rows);
    const RowResults results{row_loss.data(), row_hit.data(), result.normalizers};
    const int threads = thread_count();
    const bool share = threads > 1 && problem.rows < 4 * threads && problem.classes > kTask;
    with_memory(problem.stored, [&](auto memory) {
        typedef decltype(memory) Memory;
        const auto run = [&](auto smoothing) {
            share ? shared_rows<Memory, smoothing>(problem, 1.0 / denominator, results, result.gradient)
                  : whole_rows<Memory, smoothing>(problem, 1.0 / denominator, results, result.gradient);
        };
        problem.label_smoothing != 0 ? run(std::true_type{}) : run(std::false_type{});
    });
    double loss = 0;
    std::fill(result.group_hits, result.group_hits + problem.groups, 0);
    std::vector<double> group_loss(problem.groups, 0.0);
    for (int64_t n = 0; n < problem.rows; ++n) {
        const int64_t group = problem.group != nullptr ? problem.group[n] : 0;
        loss += row_loss[n];
        group_loss[group] += row_loss[n];
        result.group_hits[group] += row_hit[n];
    }
    std::copy(group_loss.begin(), group_loss.end(), result.group_loss);
    *result.loss = static_cast<float>(loss / denominator);
    *result.denominator = static_cast<float>(denominator);
}

void marked_cross_entropy_backward(const CrossEntropyProblem& problem, double factor, const float* normalizers,
                                   void* gradient) {
    std::vector<Slope> slopes(problem.rows);
    for (int64_t row = 0; row < problem.rows; ++row) {
        slopes[row] =
            slope_of(problem, weight_of(problem, row) * factor, normalizers[2 * row], normalizers[2 * row + 1]);
    }
    with_memory(problem.stored,
                [&](auto memory) { write_gradients<decltype(memory)>(problem, slopes.data(), gradient); });
}

}  // namespace wmengine
