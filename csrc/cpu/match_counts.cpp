// A row's prediction is the first place of its maximum. Long rows: each lane keeps its own maximum and the place of it,
// and the lanes are folded at the end of the row. Short rows, which such a fold would dominate: one row in each lane,
// transposed four classes at a time. Neither has a branch that depends on the answers.
//
// A row is finite where the sum of its answers is: that costs one addition a vector. A sum may also overflow, so one
// that is not finite only asks for a closer look.
#include "match_counts.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "half.h"
#include "matches.h"
#include "simd.h"
#include "threads.h"

namespace wmengine {
namespace {

constexpr int64_t kShortRow = 64;    // classes of rows that are transposed
constexpr int64_t kWidened = 4096;   // 16-bit answers that are widened at a time, into the nearest cache
constexpr int64_t kFewSets = 3;      // label sets that are compared label by label
constexpr int64_t kAhead = 1024;     // scores that long rows are fetched ahead of their use
constexpr int32_t kInvalid = -1;     // the prediction for a row that holds NaN or Inf
constexpr int32_t kImpossible = -2;  // a label that no class has: it equals no prediction

template <typename V>
WM_INLINE bool any_bit(V v) {
    uint64_t words[sizeof(V) / 8], any = 0;
    std::memcpy(words, &v, sizeof v);
    for (uint64_t word : words) {
        any |= word;
    }
    return any != 0;
}

WM_INLINE bool is_finite(const float* row, int64_t classes) {
    for (int64_t c = 0; c < classes; ++c) {
        if (!std::isfinite(row[c])) {
            return false;
        }
    }
    return true;
}

// The larger score of a and b, the lower place where they are equal; to *best and *place, which hold a.
template <typename Float, typename Int>
WM_INLINE void fold(Float* best, Int* place, Float b, Int b_place) {
    const Int lower = b_place < *place ? b_place : *place;
    *place = b == *best ? lower : *place;
    *place = b > *best ? b_place : *place;
    *best = maximum(b, *best);
}

WM_INLINE int32_t first_of_lanes(Float8 best, Int8 place) {
    const Int8 orders[3] = {{4, 5, 6, 7, 0, 1, 2, 3}, {2, 3, 0, 1, 6, 7, 4, 5}, {1, 0, 3, 2, 5, 4, 7, 6}};
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
        fold(&best, &place, permute(best, orders[i]), permute(place, orders[i]));
    }
    return place[0];
}

// One row of at least `lanes` classes.
template <int lanes>
WM_INLINE int32_t predict_long(const float* row, int64_t classes) {
    typedef Floats<lanes> Float;
    typedef Ints<lanes> Int;
    const Int start = iota<lanes>();
    Float best0 = load<Float>(row), best1 = best0, sum0 = best0, sum1 = {};
    Int place0 = start, place1 = start;
    // From the first aligned vector on: what is read twice changes no maximum, and loads that straddle two lines of the
    // cache cost more than one vector.
    int64_t c = (sizeof(Float) - reinterpret_cast<uintptr_t>(row) % sizeof(Float)) / sizeof(float);
    Int here = start + static_cast<int32_t>(c);
    for (; c + 2 * lanes <= classes; c += 2 * lanes) {
        __builtin_prefetch(row + c + kAhead);
        if (lanes == 16) {
            __builtin_prefetch(row + c + kAhead + lanes);
        }
        const Float z0 = load<Float>(row + c), z1 = load<Float>(row + c + lanes);
        place0 = z0 > best0 ? here : place0;
        best0 = maximum(z0, best0);
        here += lanes;
        place1 = z1 > best1 ? here : place1;
        best1 = maximum(z1, best1);
        here += lanes;
        sum0 += z0;
        sum1 += z1;
    }
    if (c + lanes <= classes) {
        const Float z = load<Float>(row + c);
        place0 = z > best0 ? here : place0;
        best0 = maximum(z, best0);
        sum0 += z;
    }
    const Float z = load<Float>(row + classes - lanes);
    place1 = z > best1 ? start + static_cast<int32_t>(classes - lanes) : place1;
    best1 = maximum(z, best1);
    sum0 += sum1 + z;
    fold(&best0, &place0, best1, place1);
    if (any_bit(sum0 - sum0) && !is_finite(row, classes)) {
        return kInvalid;
    }
    if constexpr (lanes == 16) {
        Float8 best = lower(best0);
        Int8 place = lower(place0);
        fold(&best, &place, upper(best0), upper(place0));
        return first_of_lanes(best, place);
    } else {
        return first_of_lanes(best0, place0);
    }
}

// Four scores of rows 0, 4, 8, … from `row` on, side by side.
template <int lanes>
WM_INLINE Floats<lanes> four_of_each(const float* row, int64_t stride) {
    const auto two = [](const float* a, const float* b) __attribute__((always_inline)) {
        return __builtin_shufflevector(load<Floats<4>>(a), load<Floats<4>>(b), 0, 1, 2, 3, 4, 5, 6, 7);
    };
    const Float8 low = two(row, row + 4 * stride);
    if constexpr (lanes == 16) {
        const Float8 high = two(row + 8 * stride, row + 12 * stride);
        return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    } else {
        return low;
    }
}

// In every group of four: scores a, b, c and d, 0-3 of x and 4-7 of y.
template <int a, int b, int c, int d, typename V>
WM_INLINE V of_fours(V x, V y) {
    constexpr int lanes = sizeof(V) / 4;
    constexpr auto at = [](int group, int i) { return 4 * group + (i < 4 ? i : i - 4 + lanes); };
    if constexpr (lanes == 16) {
        return __builtin_shufflevector(x, y, at(0, a), at(0, b), at(0, c), at(0, d), at(1, a), at(1, b), at(1, c),
                                       at(1, d), at(2, a), at(2, b), at(2, c), at(2, d), at(3, a), at(3, b), at(3, c),
                                       at(3, d));
    } else {
        return __builtin_shufflevector(x, y, at(0, a), at(0, b), at(0, c), at(0, d), at(1, a), at(1, b), at(1, c),
                                       at(1, d));
    }
}

// `lanes` rows at once. Reads four scores from the start of each row, even where there are fewer classes.
template <int lanes>
WM_INLINE void predict_short(const float* rows, int64_t classes, int32_t* predicted) {
    typedef Floats<lanes> Float;
    typedef Ints<lanes> Int;
    Float best = spread<lanes>(-INFINITY), sum = {};
    Int place = {};
    for (int64_t c = 0; c < classes; c += 4) {
        // The last four overlap the ones before; a class that comes again is no larger than itself.
        const int32_t first = static_cast<int32_t>(std::max<int64_t>(0, std::min(c, classes - 4)));
        Float scores[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            scores[i] = four_of_each<lanes>(rows + i * classes + first, classes);
        }
        const Float low01 = of_fours<0, 4, 1, 5>(scores[0], scores[1]);
        const Float low23 = of_fours<0, 4, 1, 5>(scores[2], scores[3]);
        const Float high01 = of_fours<2, 6, 3, 7>(scores[0], scores[1]);
        const Float high23 = of_fours<2, 6, 3, 7>(scores[2], scores[3]);
        scores[0] = of_fours<0, 1, 4, 5>(low01, low23);
        scores[1] = of_fours<2, 3, 6, 7>(low01, low23);
        scores[2] = of_fours<0, 1, 4, 5>(high01, high23);
        scores[3] = of_fours<2, 3, 6, 7>(high01, high23);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            if (i < classes) {
                place = scores[i] > best ? Int{} + (first + i) : place;
                best = maximum(scores[i], best);
                sum += scores[i];
            }
        }
    }
    store(predicted, place);
    if (any_bit(sum - sum)) {
        for (int row = 0; row < lanes; ++row) {
            predicted[row] = is_finite(rows + row * classes, classes) ? predicted[row] : kInvalid;
        }
    }
}

template <int lanes>
WM_INLINE void predict_short_rows(const float* rows, int64_t count, int64_t classes, int32_t* predicted) {
    const int64_t beyond = classes < 4 ? 3 : 0;  // rows that the last row's four scores may reach into
    int64_t n = 0;
    for (; n + lanes + beyond <= count; n += lanes) {
        predict_short<lanes>(rows + n * classes, classes, predicted + n);
    }
    while (n < count) {
        const int64_t here = std::min<int64_t>(lanes, count - n);
        float copies[lanes * kShortRow + 3] = {};
        int32_t places[lanes];
        std::copy(rows + n * classes, rows + (n + here) * classes, copies);
        predict_short<lanes>(copies, classes, places);
        std::copy(places, places + here, predicted + n);
        n += here;
    }
}

struct Predict {
    template <Level level>
    WM_INLINE void run(const float* rows, int64_t count, int64_t classes, int32_t* predicted) {
        constexpr int lanes = lanes_of(level);
        if (classes <= kShortRow) {
            predict_short_rows<lanes>(rows, count, classes, predicted);
            return;
        }
        for (int64_t n = 0; n < count; ++n) {
            predicted[n] = predict_long<lanes>(rows + n * classes, classes);
        }
    }
};

template <typename Memory>
struct Widen {
    template <Level level>
    WM_INLINE void run(const uint16_t* scores, int64_t count, float* wide) {
        constexpr int lanes = lanes_of(level);
        int64_t i = 0;
        for (; i + lanes <= count; i += lanes) {
            store(wide + i, Memory::template read<level, lanes>(scores + i));
        }
        for (; i < count; ++i) {
            wide[i] = Memory::template read_one<level>(scores + i);
        }
    }
};

struct Count {
    template <Level>
    WM_INLINE int32_t run(const int32_t* predicted, const int32_t* labels, int64_t count) {
        int32_t same = 0;
        for (int64_t n = 0; n < count; ++n) {
            same += predicted[n] == labels[n];
        }
        return same;
    }
};

struct CountInvalid {
    template <Level>
    WM_INLINE int32_t run(const int32_t* predicted, int64_t count) {
        int32_t invalid = 0;
        for (int64_t n = 0; n < count; ++n) {
            invalid += predicted[n] == kInvalid;
        }
        return invalid;
    }
};

template <typename Memory>
void predict(const typename Memory::Type* outputs, int64_t count, int64_t classes, int32_t* predicted) {
    if constexpr (std::is_same_v<Memory, Float32>) {
        dispatch<Predict>(outputs, count, classes, predicted);
    } else {
        const int64_t step = std::max<int64_t>(1, kWidened / classes);
        const std::unique_ptr<float[]> wide(new float[step * classes]);
        for (int64_t n = 0; n < count; n += step) {
            const int64_t here = std::min(step, count - n);
            dispatch<Widen<Memory>>(outputs + n * classes, here * classes, wide.get());
            dispatch<Predict>(static_cast<const float*>(wide.get()), here, classes, predicted + n);
        }
    }
}

}  // namespace

void match_counts(const void* outputs, Stored stored, int64_t suspects, int64_t queries, int64_t classes,
                  const int64_t* expected, int64_t sets, int32_t* counts, int32_t* invalid) {
    std::fill(counts, counts + suspects * sets, 0);
    std::fill(invalid, invalid + suspects, 0);
    std::vector<int32_t> labels(sets * queries);
    std::transform(expected, expected + sets * queries, labels.begin(), [classes](int64_t label) {
        return label >= 0 && label < classes ? static_cast<int32_t>(label) : kImpossible;
    });
    const bool few = sets <= kFewSets;
    const std::unique_ptr<int32_t[]> predicted(new int32_t[suspects * queries]);
    // Whole suspects, or a part of the rows of one; whole numbers add up to the same in any order.
    const int64_t rows = std::min(std::max<int64_t>(1, queries), std::max<int64_t>(64, 262144 / classes));
    const int64_t parts = (queries + rows - 1) / rows;
    const int64_t batch = std::max<int64_t>(1, 262144 / (classes * std::max<int64_t>(1, queries)));
    const int64_t groups = (suspects + batch - 1) / batch;
    parallel_for(groups * parts, [&](int64_t task) {
        const int64_t begin = task % parts * rows, count = std::min(rows, queries - begin);
        const int64_t from = task / parts * batch, to = std::min(from + batch, suspects);
        const int64_t first = from * queries + begin, last = (to - 1) * queries + begin + count;
        with_memory(stored, [&](auto memory) {
            typedef decltype(memory) Memory;
            predict<Memory>(static_cast<const typename Memory::Type*>(outputs) + first * classes, last - first, classes,
                            predicted.get() + first);
        });
        for (int64_t s = from; s < to; ++s) {
            const int32_t* own = predicted.get() + s * queries + begin;
            __atomic_fetch_add(invalid + s, dispatch<CountInvalid>(own, count), __ATOMIC_RELAXED);
            for (int64_t k = 0; few && k < sets; ++k) {
                const int32_t same = dispatch<Count>(own, labels.data() + k * queries + begin, count);
                __atomic_fetch_add(counts + s * sets + k, same, __ATOMIC_RELAXED);
            }
        }
    });
    if (!few) {
        label_matches(predicted.get(), suspects, labels.data(), sets, queries, classes - 1, counts);
    }
}

}  // namespace wmengine
