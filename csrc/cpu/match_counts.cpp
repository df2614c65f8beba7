// Long rows: a label matches when its score is the row's maximum and no earlier score is: that needs the maximum, not
// its place. Short rows, where a branch costs more than the row: eight at a time, their places found without one.
//
// Whether a row is finite comes along for free: x - x is 0 for finite x and NaN otherwise, and NaN survives an OR.
#include "match_counts.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"
#include "threads.h"

namespace wmengine {
namespace {

constexpr int64_t kShortRow = 32;  // classes of rows whose folding costs more than their reading

struct RowTop {
    float maximum;
    bool finite;
};

WM_INLINE float maximum_across(Float8 v) {
    v = maximum(v, permute8(v, Int8{4, 5, 6, 7, 0, 1, 2, 3}));
    v = maximum(v, permute8(v, Int8{2, 3, 0, 1, 6, 7, 4, 5}));
    v = maximum(v, permute8(v, Int8{1, 0, 3, 2, 5, 4, 7, 6}));
    return v[0];
}

WM_INLINE bool any_bit(Word8 v) {
    typedef uint64_t Long4 __attribute__((vector_size(32)));
    const Long4 words = (Long4)v;
    return (words[0] | words[1] | words[2] | words[3]) != 0;
}

WM_INLINE RowTop row_top(const float* z, int64_t classes) {
    if (classes < 8) {
        RowTop top{-INFINITY, true};
        float difference = 0;
        for (int64_t c = 0; c < classes; ++c) {
            top.maximum = z[c] > top.maximum ? z[c] : top.maximum;
            difference += z[c] - z[c];
        }
        top.finite = difference == 0;
        return top;
    }
    const Float8 end = load8(z + classes - 8);  // overlaps the vector before it; both reductions allow that
    Float8 best0 = end, best1 = end;
    Word8 bad0 = (Word8)(end - end), bad1 = bad0;
    int64_t c = 0;
    for (; c + 16 <= classes; c += 16) {
        const Float8 z0 = load8(z + c), z1 = load8(z + c + 8);
        best0 = maximum(z0, best0);
        best1 = maximum(z1, best1);
        bad0 |= (Word8)(z0 - z0);
        bad1 |= (Word8)(z1 - z1);
    }
    if (c + 8 <= classes) {
        const Float8 z0 = load8(z + c);
        best0 = maximum(z0, best0);
        bad0 |= (Word8)(z0 - z0);
    }
    return RowTop{maximum_across(maximum(best0, best1)), !any_bit(bad0 | bad1)};
}

struct Larger {
    template <typename V>
    WM_INLINE V of(V a, V b) {
        return a > b ? a : b;
    }
};

struct Smaller {
    template <typename V>
    WM_INLINE V of(V a, V b) {
        return a < b ? a : b;
    }
};

// Folds the lanes of eight rows, each to one lane of the result: pairs of rows share a vector after each round, so no
// row is folded alone.
template <typename Fold, typename V>
WM_INLINE V fold_eight(const V* rows) {
    V pairs[4], quads[2];
    for (int i = 0; i < 4; ++i) {
        const V a = rows[2 * i], b = rows[2 * i + 1];
        pairs[i] = Fold::of(WM_SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14), WM_SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15));
    }
    for (int i = 0; i < 2; ++i) {
        const V a = pairs[2 * i], b = pairs[2 * i + 1];
        quads[i] = Fold::of(WM_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13), WM_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15));
    }
    const V a = quads[0], b = quads[1];
    return Fold::of(WM_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11), WM_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15));
}

// The first place of the maximum of each of eight rows of 8 * (vectors - 1) < classes <= 8 * vectors, classes >= 8: the
// last vector of a row ends with it and overlaps the one before. False, and nothing said, where any row is not finite.
template <int vectors>
WM_INLINE bool eight_predictions(const float* z, int64_t classes, Int8* predicted) {
    const int32_t last = static_cast<int32_t>(classes - 8);
    const auto offset = [last](int v) __attribute__((always_inline)) { return v + 1 < vectors ? 8 * v : last; };
    Word8 bad = {};
    Float8 lanes[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const float* row = z + i * classes;
        lanes[i] = load8(row + last);
        bad |= (Word8)(lanes[i] - lanes[i]);
#pragma GCC unroll 4
        for (int v = 0; v + 1 < vectors; ++v) {
            const Float8 here = load8(row + offset(v));
            bad |= (Word8)(here - here);
            lanes[i] = maximum(here, lanes[i]);
        }
    }
    if (any_bit(bad)) {
        return false;
    }
    float maxima[8];
    store8(maxima, fold_eight<Larger>(lanes));
    const Int8 iota = {0, 1, 2, 3, 4, 5, 6, 7}, nowhere = iota + (1 << 30);
    Int8 first[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const float* row = z + i * classes;
        const Float8 top = splat(maxima[i]);
        first[i] = load8(row + last) == top ? iota + last : nowhere;
#pragma GCC unroll 4
        for (int v = vectors - 2; v >= 0; --v) {  // earlier places win
            first[i] = load8(row + offset(v)) == top ? iota + offset(v) : first[i];
        }
    }
    *predicted = fold_eight<Smaller>(first);
    return true;
}

WM_INLINE bool predict_eight(const float* z, int64_t classes, Int8* predicted) {
    switch ((classes + 7) / 8) {
        case 1:
            return eight_predictions<1>(z, classes, predicted);
        case 2:
            return eight_predictions<2>(z, classes, predicted);
        case 3:
            return eight_predictions<3>(z, classes, predicted);
        default:
            return eight_predictions<4>(z, classes, predicted);
    }
}

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

WM_INLINE void count_row(const float* z, float maximum, int64_t classes, const int32_t* expected, int64_t queries,
                         int64_t sets, int32_t* counts) {
    for (int64_t k = 0; k < sets; ++k) {
        const int32_t label = expected[k * queries];
        if (label >= 0) {
            counts[k] += is_first_maximum(z, label, maximum);
        }
    }
}

struct CountRows {
    template <Level>
    WM_INLINE void run(const float* outputs, int64_t rows, int64_t classes, const int32_t* expected, int64_t queries,
                       int64_t sets, int32_t* counts, int32_t* invalid) {
        int64_t n = 0;
        if (classes >= 8 && classes <= kShortRow) {
            for (; n + 8 <= rows; n += 8) {
                Int8 predicted;
                if (predict_eight(outputs + n * classes, classes, &predicted)) {
                    for (int64_t k = 0; k < sets; ++k) {
                        Int8 labels;
                        std::memcpy(&labels, expected + k * queries + n, sizeof labels);
                        const Int8 same = labels == predicted;  // -1 where equal
                        counts[k] -=
                            (same[0] + same[1]) + (same[2] + same[3]) + (same[4] + same[5]) + (same[6] + same[7]);
                    }
                    continue;
                }
                for (int64_t i = n; i < n + 8; ++i) {
                    const RowTop top = row_top(outputs + i * classes, classes);
                    if (top.finite) {
                        count_row(outputs + i * classes, top.maximum, classes, expected + i, queries, sets, counts);
                    } else {
                        ++*invalid;
                    }
                }
            }
        }
        for (; n < rows; ++n) {
            const float* z = outputs + n * classes;
            const RowTop top = row_top(z, classes);
            if (top.finite) {
                count_row(z, top.maximum, classes, expected + n, queries, sets, counts);
            } else {
                ++*invalid;
            }
        }
    }
};

void count_rows(const float* outputs, int64_t rows, int64_t classes, const int32_t* expected, int64_t queries,
                int64_t sets, int32_t* counts, int32_t* invalid) {
    dispatch<CountRows>(outputs, rows, classes, expected, queries, sets, counts, invalid);
}

}  // namespace

void match_counts(const float* outputs, int64_t suspects, int64_t queries, int64_t classes, const int64_t* expected,
                  int64_t sets, int32_t* counts, int32_t* invalid) {
    std::fill(counts, counts + suspects * sets, 0);
    std::fill(invalid, invalid + suspects, 0);
    // Labels as 32-bit numbers, -1 for those that no class has.
    std::vector<int32_t> labels(sets * queries);
    std::transform(expected, expected + sets * queries, labels.begin(), [classes](int64_t label) {
        return label >= 0 && label < classes ? static_cast<int32_t>(label) : -1;
    });
    // Parts of one suspect's rows; whole numbers add up to the same in any order.
    const int64_t cost = std::max<int64_t>(1, classes + 8 * sets);
    const int64_t rows = std::min(std::max<int64_t>(1, queries), std::max<int64_t>(64, 262144 / cost));
    const int64_t parts = (queries + rows - 1) / rows;
    const int64_t batch = std::max<int64_t>(1, 262144 / std::max<int64_t>(1, cost * queries));  // suspects a task
    const int64_t groups = (suspects + batch - 1) / batch;
    parallel_for(groups * parts, [&](int64_t task) {
        const int64_t part = task % parts, begin = part * rows, count = std::min(rows, queries - begin);
        const int64_t from = task / parts * batch, to = std::min(from + batch, suspects);
        std::vector<int32_t> local(sets);
        for (int64_t s = from; s < to; ++s) {
            std::fill(local.begin(), local.end(), 0);
            int32_t bad = 0;
            count_rows(outputs + (s * queries + begin) * classes, count, classes, labels.data() + begin, queries, sets,
                       local.data(), &bad);
            for (int64_t k = 0; k < sets; ++k) {
                __atomic_fetch_add(counts + s * sets + k, local[k], __ATOMIC_RELAXED);
            }
            __atomic_fetch_add(invalid + s, bad, __ATOMIC_RELAXED);
        }
    });
}

}  // namespace wmengine
