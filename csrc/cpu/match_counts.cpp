// A row is read for its highest score, for its mean and deviation, and for its levels; all but once from a near cache.
//
// Sums are of doubles, four lanes and two sums by turns whatever the instruction set, so that all give the same bits.
// They are of differences from the highest score: what is equal then adds up to 0, and nothing that matters cancels.
// Levels are counted from bytes, in two tables by turns: a count waits for the one before it at the same place.
#include "match_counts.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "simd.h"
#include "threads.h"

namespace wmengine {
namespace {

constexpr int64_t kPadding = 16;    // scores past the end of a row that a vector may read
constexpr int64_t kWidened = 4096;  // scores that are copied at a time, into the nearest cache
constexpr int64_t kTask = 32768;    // scores a task
constexpr int64_t kRowCost = 64;    // scores that take as long as what a row costs beside them
constexpr int32_t kInvalid = -1;    // the prediction for a row that names no class
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef double Double4 __attribute__((vector_size(32)));
typedef uint64_t Word4 __attribute__((vector_size(32)));

WM_INLINE Double4 four(double x) {
    const double copies[4] = {x, x, x, x};
    return load<Double4>(copies);
}

template <typename Half>
WM_INLINE Double4 doubles(Half v) {
    return __builtin_convertvector(v, Double4);
}

template <typename Mask>
WM_INLINE Double4 where(Mask mask, Double4 v) {
    return (Double4)((Word4)mask & (Word4)v);
}

// f(scores, the class of the first) for a row, vector by vector; `filler` stands for what lies past its end.
template <typename Vector, typename F>
WM_INLINE void each(const float* row, int64_t classes, float filler, F f) {
    constexpr int lanes = sizeof(Vector) / sizeof(float);
    int64_t c = 0;
    for (; c + lanes <= classes; c += lanes) {
        f(load<Vector>(row + c), c);
    }
    if (c < classes) {
        const Vector last = load<Vector>(row + c);
        f(iota<lanes>() < static_cast<int32_t>(classes - c) ? last : spread<lanes>(filler), c);
    }
}

struct Highest {
    float score, least;
    int32_t place;  // kInvalid where the row names no class
};

template <int lanes>
WM_INLINE Highest highest(const float* row, int64_t classes) {
    typedef Floats<lanes> Float;
    typedef Ints<lanes> Int;
    const Int start = iota<lanes>();
    Float best = spread<lanes>(-kInfinity), least = spread<lanes>(kInfinity);
    Int place = {}, numbers = ~Int{};
    each<Float>(row, classes, row[0], [&](Float z, int64_t c) __attribute__((always_inline)) {
        place = z > best ? start + static_cast<int32_t>(c) : place;
        best = maximum(z, best);
        least = minimum(z, least);
        numbers &= z < spread<lanes>(kInfinity);  // false for NaN too
    });
    const float score = maximum_of(best);
    // A lane that holds a filler comes after the one that holds the score which it repeats.
    const Int first = best == spread<lanes>(score) ? place : Int{} + std::numeric_limits<int32_t>::max();
    const bool valid = maximum_of(numbers) != 0 && score > -kInfinity;
    return {score, minimum_of(least), valid ? minimum_of(first) : kInvalid};
}

WM_INLINE bool is_distribution(const float* row, int64_t classes, float least) {
    if (!(least >= 0.0f)) {
        return false;
    }
    Double4 low = {}, high = {};
    each<Float8>(row, classes, 0.0f, [&](Float8 p, int64_t) __attribute__((always_inline)) {
        low += doubles(lower(p));
        high += doubles(upper(p));
    });
    const Double4 both = low + high;
    return std::fabs((both[0] + both[1]) + (both[2] + both[3]) - 1.0) <= 1e-3;
}

// ln x of x >= 0, within 1e-13 and half a unit in the last place: x = 2^e m, m from 1/sqrt(2) to sqrt(2), and
// ln m = 2 artanh((m - 1) / (m + 1)) by its series.
WM_INLINE Double4 logarithm(Double4 x) {
    constexpr uint64_t root = 0x3FE6A09E667F3BCD, one = 0x3FF0000000000000;  // 1/sqrt(2) and 1, as bits
    const Word4 shifted = (Word4)x - root + one;
    const Double4 m = (Double4)((Word4)x - (shifted & 0xFFF0000000000000) + one);
    const Double4 e = (Double4)((shifted >> 52) | 0x4330000000000000) - four(0x1p52 + 1023.0);
    const Double4 s = (m - four(1.0)) / (m + four(1.0)), square = s * s;
    Double4 series = four(1.0 / 15.0);
    for (double odd : {13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0}) {
        series = series * square + four(1.0 / odd);
    }
    const Double4 found = e * four(0.693147180559945309417) + (s + s) * series;
    return x > four(0.0) ? found : four(-INFINITY);
}

// Levels of a row's scores less `shift`, which is their highest: to levels[classes], and a few bytes past them.
WM_INLINE void standardise(const float* row, int64_t classes, float shift, int8_t* levels) {
    const Double4 top = four(shift), lowest = four(-kMostLevel), highest = four(kMostLevel);
    Double4 count[2] = {}, sum[2] = {}, squares[2] = {};
    each<Float8>(row, classes, -kInfinity, [&](Float8 scores, int64_t) __attribute__((always_inline)) {
        const Double4 z[2] = {doubles(lower(scores)) - top, doubles(upper(scores)) - top};
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const auto there = z[i] > four(-INFINITY);
            const Double4 d = where(there, z[i]);
            count[i] += where(there, four(1.0));
            sum[i] += d;
            squares[i] += d * d;
        }
    });
    const auto total = [](const Double4* v) __attribute__((always_inline)) {
        const Double4 both = v[0] + v[1];
        return (both[0] + both[1]) + (both[2] + both[3]);
    };
    const double mean = total(sum) / total(count), variance = total(squares) / total(count) - mean * mean;
    if (!(variance >
          0.0)) {  // all equal: with float32's 24 bits a deviation cannot be as small as the reference's least
        for (int64_t c = 0; c < classes; ++c) {
            levels[c] = row[c] > -kInfinity ? 0 : -kMostLevel;
        }
        return;
    }
    const Double4 scale = four(10.0 / std::sqrt(variance)), middle = four(mean);
    const Double4 rounder = four(0x1.8p52);  // what is added to it is rounded to an integer, ties to even
    each<Float8>(row, classes, -kInfinity, [&](Float8 scores, int64_t c) __attribute__((always_inline)) {
        const Double4 z[2] = {doubles(lower(scores)) - top, doubles(upper(scores)) - top};
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const Double4 level = maximum(minimum((z[i] - middle) * scale, highest), lowest);
            const Ints<4> whole = __builtin_convertvector((level + rounder) - rounder, Ints<4>);
            typedef int8_t Byte4 __attribute__((vector_size(4)));
            store(levels + c + 4 * i, __builtin_convertvector(whole, Byte4));
        }
    });
}

WM_INLINE void count_levels(const int8_t* levels, int64_t classes, uint32_t* histogram) {
    uint32_t counts[2][kLevels] = {};
    int64_t c = 0;
    for (; c + 2 <= classes; c += 2) {
        ++counts[0][levels[c] + kMostLevel];
        ++counts[1][levels[c + 1] + kMostLevel];
    }
    for (; c < classes; ++c) {
        ++counts[0][levels[c] + kMostLevel];
    }
    for (int i = 0; i < kLevels; ++i) {
        histogram[i] = counts[0][i] + counts[1][i];
    }
}

// Memory of a task's own, for one row: levels, and the logarithms of a distribution.
struct Scratch {
    int8_t* levels;
    float* logarithms;
};

struct Match {
    template <Level level>
    WM_INLINE void run(const float* rows, int64_t count, int64_t classes, const int64_t* expected, Matches found,
                       Scratch scratch) {
        for (int64_t n = 0; n < count; ++n) {
            const float* row = rows + n * classes;
            const Highest top = highest<lanes_of(level)>(row, classes);
            if (top.place == kInvalid) {
                std::memset(scratch.levels, 0, classes);
            } else if (is_distribution(row, classes, top.least)) {
                const Double4 whole = logarithm(four(top.score));
                each<Float8>(row, classes, 0.0f, [&](Float8 p, int64_t c) __attribute__((always_inline)) {
                    const Double4 low = logarithm(doubles(lower(p))) - whole;
                    const Double4 high = logarithm(doubles(upper(p))) - whole;
                    store(scratch.logarithms + c, __builtin_convertvector(low, Floats<4>));
                    store(scratch.logarithms + c + 4, __builtin_convertvector(high, Floats<4>));
                });
                standardise(scratch.logarithms, classes, 0.0f, scratch.levels);
            } else {
                standardise(row, classes, top.score, scratch.levels);
            }
            const bool known = top.place != kInvalid && expected[n] >= 0 && expected[n] < classes;
            found.predicted[n] = top.place;
            found.at[n] = known ? scratch.levels[expected[n]] : 0;
            count_levels(scratch.levels, classes, found.histogram + n * kLevels);
            if (found.levels != nullptr) {
                std::memcpy(found.levels + n * classes, scratch.levels, classes);
            }
        }
    }
};

template <typename Memory>
struct Widen {
    template <Level level>
    WM_INLINE void run(const typename Memory::Type* scores, int64_t count, float* wide) {
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

Matches rows_from(const Matches& found, int64_t first, int64_t classes) {
    return {found.predicted + first,
            found.at + first,
            found.histogram + first * kLevels,
            nullptr,
            nullptr,
            found.levels == nullptr ? nullptr : found.levels + first * classes};
}

template <typename Memory>
void match_rows(const Matching& given, int64_t first, int64_t end, const Matches& found) {
    const int64_t classes = given.classes;
    const auto* scores = static_cast<const typename Memory::Type*>(given.scores);
    const std::unique_ptr<int8_t[]> levels(new int8_t[classes + kPadding]);
    const std::unique_ptr<float[]> logarithms(new float[classes + kPadding]);
    const auto match = [&](const float* rows, int64_t from, int64_t count) {
        dispatch<Match>(rows, count, classes, given.expected + from, rows_from(found, from, classes),
                        Scratch{levels.get(), logarithms.get()});
    };
    int64_t n = first;
    if constexpr (std::is_same_v<Memory, Float32>) {  // as they lie, up to those that nothing readable follows
        const int64_t alone = (kPadding + classes - 1) / classes;
        const int64_t followed = std::min(end, given.rows - alone);
        if (followed > n) {
            match(scores + n * classes, n, followed - n);
            n = followed;
        }
    }
    const int64_t step = std::max<int64_t>(1, kWidened / classes);
    const std::unique_ptr<float[]> wide(n < end ? new float[step * classes + kPadding]() : nullptr);
    for (; n < end; n += step) {
        const int64_t here = std::min(step, end - n);
        dispatch<Widen<Memory>>(scores + n * classes, here * classes, wide.get());
        match(wide.get(), n, here);
    }
}

}  // namespace

void match_counts(const Matching& given, const Matches& found) {
    const int64_t step = std::max<int64_t>(1, kTask / (given.classes + kRowCost));
    parallel_for((given.rows + step - 1) / step, [&](int64_t task) {
        with_memory(given.stored, [&](auto memory) {
            match_rows<decltype(memory)>(given, task * step, std::min((task + 1) * step, given.rows), found);
        });
    });
    std::fill(found.hits, found.hits + given.groups, 0);
    std::fill(found.invalid, found.invalid + given.groups, 0);
    for (int64_t n = 0; n < given.rows; ++n) {
        const int64_t group = given.group == nullptr ? 0 : given.group[n];
        const int32_t predicted = found.predicted[n];
        found.invalid[group] += predicted == kInvalid;
        found.hits[group] += predicted != kInvalid && predicted == given.expected[n];
    }
}

}  // namespace wmengine
