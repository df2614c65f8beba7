// A label matches when its score is the row's maximum and no earlier score is: that needs the maximum, not its place.
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

WM_CLONES void count_rows(const float* outputs, int64_t rows, int64_t classes, const int64_t* expected, int64_t queries,
                          int64_t sets, int32_t* counts, int32_t* invalid) {
    for (int64_t n = 0; n < rows; ++n) {
        const float* z = outputs + n * classes;
        const RowTop top = row_top(z, classes);
        if (!top.finite) {
            ++*invalid;
            continue;
        }
        for (int64_t k = 0; k < sets; ++k) {
            const int64_t label = expected[k * queries + n];
            if (label >= 0 && label < classes) {
                counts[k] += is_first_maximum(z, label, top.maximum);
            }
        }
    }
}

}  // namespace

void match_counts(const float* outputs, int64_t suspects, int64_t queries, int64_t classes, const int64_t* expected,
                  int64_t sets, int32_t* counts, int32_t* invalid) {
    std::fill(counts, counts + suspects * sets, 0);
    std::fill(invalid, invalid + suspects, 0);
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
            count_rows(outputs + (s * queries + begin) * classes, count, classes, expected + begin, queries, sets,
                       local.data(), &bad);
            for (int64_t k = 0; k < sets; ++k) {
                __atomic_fetch_add(counts + s * sets + k, local[k], __ATOMIC_RELAXED);
            }
            __atomic_fetch_add(invalid + s, bad, __ATOMIC_RELAXED);
        }
    });
}

}  // namespace wmengine
