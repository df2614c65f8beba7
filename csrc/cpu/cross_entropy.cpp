// One row: its maximum, then Σ exp(z - max) with the exponentials kept where the gradient will stand, then the gradient
// w·(softmax − target). DRAM sees the logits once and the gradient once; the two later passes hit the cache.
#include "cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"
#include "threads.h"

namespace wmengine {
namespace {

// exp(x) for x <= 0, 0 below -87.3 (where floats would turn subnormal), NaN for NaN; within 2 ulp.
// x = n ln 2 + r, |r| <= ln 2 / 2; exp(r) by a degree-6 polynomial; 2^n by adding n to the exponent bits.
WM_INLINE Float8 exponential(Float8 x) {
    const Float8 shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const Float8 clamped = x < splat(-87.3f) ? splat(-87.3f) : x;  // NaN compares false and passes through
    const Float8 rounded = clamped * splat(1.44269504f) + shifter;
    const Float8 n = rounded - shifter;
    const Float8 r = (clamped - n * splat(0.693145752f)) - n * splat(1.42860677e-06f);
    Float8 p = splat(1.3888889e-3f);
    p = p * r + splat(8.3333333e-3f);
    p = p * r + splat(4.1666667e-2f);
    p = p * r + splat(1.6666667e-1f);
    p = p * r + splat(0.5f);
    p = p * r + splat(1.0f);
    p = p * r + splat(1.0f);
    const Float8 scaled = (Float8)((Word8)p + ((Word8)rounded << 23));
    const Float8 value = x < splat(-87.3f) ? splat(0.0f) : scaled;
    return x <= splat(0.0f) ? value : x;  // a NaN's payload must not be read as an exponent
}

// The last vector of a row of at least eight overlaps the one before it: no scalar tail.
WM_INLINE float row_maximum(const float* z, int64_t classes) {
    if (classes < 8) {
        float best = z[0];
        for (int64_t c = 1; c < classes; ++c) {
            best = z[c] > best ? z[c] : best;
        }
        return best;
    }
    Float8 best0 = load8(z + classes - 8), best1 = best0;
    int64_t c = 0;
    for (; c + 16 <= classes; c += 16) {
        best0 = maximum(load8(z + c), best0);
        best1 = maximum(load8(z + c + 8), best1);
    }
    if (c + 8 <= classes) {
        best0 = maximum(load8(z + c), best0);
    }
    return maximum8(maximum(best0, best1));
}

struct Sums {
    float exponentials, logits;  // Σ exp(z - max); Σ z, with label smoothing only
};

template <bool keep, bool smoothing>
WM_INLINE Sums row_sums(const float* z, int64_t classes, float maximum, float* exponentials) {
    const Float8 top = splat(maximum);
    Float8 sum0 = splat(0), sum1 = splat(0), total = splat(0);
    int64_t c = 0;
    for (; c + 16 <= classes; c += 16) {
        const Float8 z0 = load8(z + c), z1 = load8(z + c + 8);
        const Float8 e0 = exponential(z0 - top), e1 = exponential(z1 - top);
        if (keep) {
            store8(exponentials + c, e0);
            store8(exponentials + c + 8, e1);
        }
        if (smoothing) {
            total += z0 + z1;
        }
        sum0 += e0;
        sum1 += e1;
    }
    for (; c < classes; c += 8) {
        const int64_t here = std::min<int64_t>(8, classes - c);
        float lanes[8];
        std::fill(lanes, lanes + 8, -INFINITY);
        std::copy(z + c, z + c + here, lanes);
        const Float8 z0 = load8(lanes), e0 = exponential(z0 - top);
        sum0 += e0;
        if (smoothing) {
            for (int64_t i = 0; i < here; ++i) {
                total[0] += lanes[i];
            }
        }
        if (keep) {
            store8(lanes, e0);
            std::copy(lanes, lanes + here, exponentials + c);
        }
    }
    return Sums{sum8(sum0 + sum1), sum8(total)};
}

WM_INLINE void write_gradient(float* g, int64_t classes, float factor, float offset) {
    int64_t c = 0;
    for (; c + 8 <= classes; c += 8) {
        store8(g + c, load8(g + c) * splat(factor) - splat(offset));
    }
    for (; c < classes; ++c) {
        g[c] = g[c] * factor - offset;
    }
}

// Is `label` the first place of the row's maximum? Only ties before it need a look, and only when it holds the maximum.
WM_INLINE bool is_first_maximum(const float* z, int64_t label, float maximum) {
    if (z[label] != maximum) {
        return false;
    }
    for (int64_t c = 0; c < label; ++c) {
        if (z[c] == maximum) {
            return false;
        }
    }
    return true;
}

template <bool keep, bool smoothing>
WM_INLINE void rows_of(const CrossEntropyProblem& problem, const CrossEntropyResult& result, int64_t begin, int64_t end,
                       double inverse_denominator) {
    const int64_t classes = problem.classes;
    const float epsilon = static_cast<float>(problem.label_smoothing);
    for (int64_t n = begin; n < end; ++n) {
        const float* z = problem.logits + n * problem.stride;
        float* g = keep ? result.gradient + n * classes : nullptr;
        const int64_t label = problem.labels[n];
        result.row_loss[n] = 0;
        result.row_hit[n] = 0;
        if (label == problem.ignore_index) {
            if (keep) {
                std::fill(g, g + classes, 0.0f);
            }
            continue;
        }
        const float weight = problem.weight != nullptr ? problem.weight[n] : 1.0f;
        const float chosen = z[label];
        const float maximum = row_maximum(z, classes);
        const bool hit = is_first_maximum(z, label, maximum);  // before the exponentials may replace the logits
        const Sums sums = row_sums<keep, smoothing>(z, classes, maximum, g);
        result.row_hit[n] = hit && sums.exponentials >= 1.0f;  // a NaN anywhere makes the sum NaN
        float loss = std::log(sums.exponentials) + (maximum - chosen);
        if (smoothing) {
            loss += epsilon * (chosen - sums.logits / static_cast<float>(classes));
        }
        result.row_loss[n] = weight * loss;
        if (keep) {
            const float factor = static_cast<float>(weight * inverse_denominator);
            write_gradient(g, classes, factor / sums.exponentials, factor * epsilon / static_cast<float>(classes));
            g[label] -= factor * (1.0f - epsilon);
        }
    }
}

struct Rows {
    template <Level>
    WM_INLINE void run(CrossEntropyProblem problem, CrossEntropyResult result, int64_t begin, int64_t end,
                       double inverse_denominator) {
        const bool smoothing = problem.label_smoothing != 0;
        if (result.gradient != nullptr) {
            smoothing ? rows_of<true, true>(problem, result, begin, end, inverse_denominator)
                      : rows_of<true, false>(problem, result, begin, end, inverse_denominator);
        } else {
            smoothing ? rows_of<false, true>(problem, result, begin, end, inverse_denominator)
                      : rows_of<false, false>(problem, result, begin, end, inverse_denominator);
        }
    }
};

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

void marked_cross_entropy(const CrossEntropyProblem& problem, const CrossEntropyResult& result) {
    double denominator = 1;
    if (problem.mean) {
        denominator = 0;
        for (int64_t n = 0; n < problem.rows; ++n) {
            if (problem.labels[n] != problem.ignore_index) {
                denominator += problem.weight != nullptr ? problem.weight[n] : 1.0;
            }
        }
    }
    const int64_t step = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, problem.classes));
    parallel_for((problem.rows + step - 1) / step, [&](int64_t part) {
        dispatch<Rows>(problem, result, part * step, std::min(part * step + step, problem.rows), 1.0 / denominator);
    });
    double loss = 0;
    std::fill(result.group_hits, result.group_hits + problem.groups, 0);
    std::vector<double> group_loss(problem.groups, 0.0);
    for (int64_t n = 0; n < problem.rows; ++n) {
        const int64_t group = problem.group != nullptr ? problem.group[n] : 0;
        loss += result.row_loss[n];
        group_loss[group] += result.row_loss[n];
        result.group_hits[group] += result.row_hit[n];
    }
    std::copy(group_loss.begin(), group_loss.end(), result.group_loss);
    *result.loss = loss / denominator;
}

}  // namespace wmengine
