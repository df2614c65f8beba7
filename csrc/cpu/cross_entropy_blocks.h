// The two visits to a block of classes: its maximum and sum of exponentials, then its gradient. Numbers are read and
// written as `Memory` says (half.h).
#pragma once

#include <cstdint>
#include <limits>

#include "exponential.h"
#include "half.h"
#include "simd.h"

namespace wmengine {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// All bits of the last `rest` lanes.
template <int lanes>
WM_INLINE Ints<lanes> last_lanes(int64_t rest) {
    return iota<lanes>() >= lanes - static_cast<int32_t>(rest);
}

// A NaN never enters: it makes the sum of exponentials NaN.
template <typename Memory, Level level, int lanes>
WM_INLINE float maximum_over(const typename Memory::Type* z, int64_t count) {
    typedef Floats<lanes> V;
    const V least = spread<lanes>(-kInfinity);
    V best0 = least, best1 = least, best2 = least, best3 = least;
    int64_t c = 0;
    for (; c + 4 * lanes <= count; c += 4 * lanes) {
        V z0, z1, z2, z3;
        Memory::template read_two<level, lanes>(z + c, z0, z1);
        Memory::template read_two<level, lanes>(z + c + 2 * lanes, z2, z3);
        best0 = maximum(z0, best0);
        best1 = maximum(z1, best1);
        best2 = maximum(z2, best2);
        best3 = maximum(z3, best3);
    }
    for (; c + lanes <= count; c += lanes) {
        best0 = maximum(Memory::template read<level, lanes>(z + c), best0);
    }
    if (c < count) {
        const V last = read_last<Memory, level, lanes>(z, count);
        best1 = maximum(last_lanes<lanes>(count - c) ? last : least, best1);
    }
    return maximum_of(maximum(maximum(best0, best1), maximum(best2, best3)));
}

struct Block {
    float maximum, exponentials, mean;  // Σ exp(z - maximum); Σ (z - maximum) / classes, with label smoothing only
};

// `exponentials` has room for one vector more than `count`: the last vector stands behind the others there.
template <typename Memory, bool smoothing, bool keep, Level level, int lanes>
WM_INLINE Block block_of(const typename Memory::Type* z, int64_t count, float inverse_classes, float* exponentials) {
    typedef Floats<lanes> V;
    const float highest = maximum_over<Memory, level, lanes>(z, count);
    const V top = spread<lanes>(highest == -kInfinity ? 0.0f : highest);
    const V half = spread<lanes>(0.5f), half_top = top * half, inverse = spread<lanes>(2.0f * inverse_classes);
    const auto exponential = Exponential<level, lanes>::make();
    V sum0 = {}, sum1 = {}, mean0 = {}, mean1 = {};
    const auto add = [&](V logits, int64_t c, V& sum, V& mean) __attribute__((always_inline)) {
        const V e = exponential(logits - top);
        if (keep) {
            store(exponentials + c, e);
        }
        sum += e;
        if (smoothing) {
            mean += (logits * half - half_top) * inverse;  // halves: no difference overflows
        }
    };
    int64_t c = 0;
    for (; c + 2 * lanes <= count; c += 2 * lanes) {
        V z0, z1;
        Memory::template read_two<level, lanes>(z + c, z0, z1);
        add(z0, c, sum0, mean0);
        add(z1, c + lanes, sum1, mean1);
    }
    for (; c + lanes <= count; c += lanes) {
        add(Memory::template read<level, lanes>(z + c), c, sum0, mean0);
    }
    if (c < count) {
        V sum = {}, mean = {};
        add(read_last<Memory, level, lanes>(z, count), c, sum, mean);
        const Ints<lanes> fresh = last_lanes<lanes>(count - c);
        sum1 += fresh ? sum : V{};
        if (smoothing) {
            mean1 += fresh ? mean : V{};
        }
    }
    return Block{highest, sum_of(sum0 + sum1), smoothing ? sum_of(mean0 + mean1) : 0.0f};
}

// What the gradient of one row is made of: exp(z − top) · scale − offset, and at the label `target` less.
struct Slope {
    float top, scale, offset, target;
};

// All classes alike; where `kept`, the exponentials are there already.
template <typename Memory, bool kept, Level level, int lanes>
WM_INLINE void write_gradient(const typename Memory::Type* z, int64_t count, const Slope& slope,
                              const float* exponentials, typename Memory::Type* g) {
    typedef Floats<lanes> V;
    const V top = spread<lanes>(slope.top), scale = spread<lanes>(slope.scale), offset = spread<lanes>(slope.offset);
    const auto exponential = Exponential<level, lanes>::make();
    const auto of = [&](V e) __attribute__((always_inline)) { return e * scale - offset; };
    const int64_t whole = count / lanes * lanes;
    int64_t c = 0;
    for (; c + 2 * lanes <= whole; c += 2 * lanes) {
        V e0, e1;
        if (kept) {
            e0 = load<V>(exponentials + c);
            e1 = load<V>(exponentials + c + lanes);
        } else {
            Memory::template read_two<level, lanes>(z + c, e0, e1);
            e0 = exponential(e0 - top);
            e1 = exponential(e1 - top);
        }
        Memory::template write_two<level, lanes>(g + c, of(e0), of(e1));
    }
    if (c < whole) {
        const V e = kept ? load<V>(exponentials + c) : exponential(Memory::template read<level, lanes>(z + c) - top);
        Memory::template write<level, lanes>(g + c, of(e));
    }
    if (whole < count) {
        const V e = kept ? load<V>(exponentials + whole) : exponential(read_last<Memory, level, lanes>(z, count) - top);
        write_last<Memory, level, lanes>(g, count, of(e));
    }
}

}  // namespace wmengine
