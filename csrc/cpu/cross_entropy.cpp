// A row is cut into blocks of classes. A block gives its maximum and Σ exp(z - maximum) in one visit; the blocks of a
// row are put together in order, so the answer does not depend on who computed which. Then the gradient is written,
// w·(softmax − target). A row of one block keeps its exponentials until then, in the first-level cache; a longer one
// computes them again, which costs less than a trip of theirs to the second level. DRAM sees the logits once and the
// gradient once, and the gradient may stand where the logits stood.
#include "cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "simd.h"
#include "threads.h"

namespace wmengine {
namespace {

constexpr int64_t kBlock = 4096;  // classes; their exponentials take 16 kB
constexpr int64_t kTask = 32768;  // classes that a thread takes at a time, in whole rows or in blocks of one row
constexpr float kInfinity = std::numeric_limits<float>::infinity();

WM_INLINE float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

WM_INLINE uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

template <int lanes>
struct Halves {
    typedef uint16_t Type __attribute__((vector_size(2 * lanes)));
};

// How logits lie in memory: widened to float32 when read, rounded to the nearest when written, ties to even. Two
// vectors at a time may be read in any order that writing them undoes. A NaN that is written has no payload.
struct Float32 {
    typedef float Type;

    template <Level level, int lanes>
    WM_INLINE Floats<lanes> read(const float* p) {
        return load<Floats<lanes>>(p);
    }

    template <Level level, int lanes>
    WM_INLINE void read_two(const float* p, Floats<lanes>& a, Floats<lanes>& b) {
        a = load<Floats<lanes>>(p);
        b = load<Floats<lanes>>(p + lanes);
    }

    template <Level level>
    WM_INLINE float read_one(const float* p) {
        return *p;
    }

    template <Level level, int lanes>
    WM_INLINE void write(float* p, Floats<lanes> v) {
        store(p, v);
    }

    template <Level level, int lanes>
    WM_INLINE void write_two(float* p, Floats<lanes> a, Floats<lanes> b) {
        store(p, a);
        store(p + lanes, b);
    }

    template <Level level>
    WM_INLINE void write_one(float* p, float x) {
        *p = x;
    }
};

struct Bfloat16 {
    typedef uint16_t Type;

    template <typename Word>
    WM_INLINE Word rounded(Word bits) {
        return bits + 0x7FFF + ((bits >> 16) & 1);
    }

    template <Level level, int lanes>
    WM_INLINE Floats<lanes> read(const uint16_t* p) {
        return (Floats<lanes>)(__builtin_convertvector(load<typename Halves<lanes>::Type>(p), Words32<lanes>) << 16);
    }

    template <Level level, int lanes>
    WM_INLINE void read_two(const uint16_t* p, Floats<lanes>& a, Floats<lanes>& b) {
        const Words32<lanes> pairs = load<Words32<lanes>>(p);
        a = (Floats<lanes>)(pairs << 16);
        b = (Floats<lanes>)(pairs & 0xFFFF0000);
    }

    template <Level level>
    WM_INLINE float read_one(const uint16_t* p) {
        return from_bits(uint32_t{*p} << 16);
    }

    template <Level level, int lanes>
    WM_INLINE void write(uint16_t* p, Floats<lanes> v) {
        store(p, __builtin_convertvector(rounded((Words32<lanes>)v) >> 16, typename Halves<lanes>::Type));
    }

    template <Level level, int lanes>
    WM_INLINE void write_two(uint16_t* p, Floats<lanes> a, Floats<lanes> b) {
        typedef Words32<lanes> Word;
        store(p, (rounded((Word)a) >> 16) | (rounded((Word)b) & 0xFFFF0000));
    }

    template <Level level>
    WM_INLINE void write_one(uint16_t* p, float x) {
        *p = static_cast<uint16_t>(rounded(to_bits(x)) >> 16);
    }
};

struct Float16 {
    typedef uint16_t Type;

    template <Level level, int lanes>
    WM_INLINE Floats<lanes> widened(typename Halves<lanes>::Type half) {
        typedef Words32<lanes> Word;
#if defined(WM_X86_64) && !defined(__clang__)
        if constexpr (level != Level::kBaseline) {
            Floats<lanes> wide;
            asm("vcvtph2ps %1, %0" : "=v"(wide) : "v"(half));
            return wide;
        }
#endif
        const Word bits = __builtin_convertvector(half, Word);
        const Word magnitude = (bits & 0x7FFF) << 13;
        const Word number = (Word)((Floats<lanes>)magnitude * spread<lanes>(0x1p112f));  // subnormals come out right
        const Word beyond = (Word)(magnitude >= 0x0F800000) & 0x7F800000;                // infinities and NaNs
        return (Floats<lanes>)(number | beyond | (bits & 0x8000) << 16);
    }

    template <Level level, int lanes>
    WM_INLINE typename Halves<lanes>::Type narrowed(Floats<lanes> v) {
        typedef Words32<lanes> Word;
        typedef typename Halves<lanes>::Type Half;
#if defined(WM_X86_64) && !defined(__clang__)
        if constexpr (level != Level::kBaseline) {
            Half narrow;
            asm("vcvtps2ph $0, %1, %0" : "=v"(narrow) : "v"(v));
            return narrow;
        }
#endif
        const Word magnitude = (Word)v & 0x7FFFFFFF;
        const Word normal = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
        const Word subnormal = (Word)((Floats<lanes>)magnitude + spread<lanes>(0.5f)) - 0x3F000000;
        const Word finite = magnitude < 0x38800000 ? subnormal : normal;
        const Word infinite = Word{} + 0x7C00, nan = Word{} + 0x7E00;
        const Word beyond = magnitude > 0x7F800000 ? nan : infinite;
        const Word bits = (magnitude < 0x47800000 ? finite : beyond) | ((Word)v >> 16 & 0x8000);
        return __builtin_convertvector(bits, Half);
    }

    template <Level level, int lanes>
    WM_INLINE Floats<lanes> read(const uint16_t* p) {
        return widened<level, lanes>(load<typename Halves<lanes>::Type>(p));
    }

    template <Level level, int lanes>
    WM_INLINE void read_two(const uint16_t* p, Floats<lanes>& a, Floats<lanes>& b) {
        a = read<level, lanes>(p);
        b = read<level, lanes>(p + lanes);
    }

    template <Level level>
    WM_INLINE float read_one(const uint16_t* p) {
        return widened<level, 8>(Halves<8>::Type{} + *p)[0];
    }

    template <Level level, int lanes>
    WM_INLINE void write(uint16_t* p, Floats<lanes> v) {
        store(p, narrowed<level, lanes>(v));
    }

    template <Level level, int lanes>
    WM_INLINE void write_two(uint16_t* p, Floats<lanes> a, Floats<lanes> b) {
        write<level, lanes>(p, a);
        write<level, lanes>(p + lanes, b);
    }

    template <Level level>
    WM_INLINE void write_one(uint16_t* p, float x) {
        *p = narrowed<level, 8>(spread<8>(x))[0];
    }
};

// exp(x) for x <= 0, 0 where it is below 2^-127, NaN for NaN; within 3 units in the last place down to -32, 5 below.
// x = n ln 2 + r, |r| <= ln 2 / 2; exp(r) by a minimax polynomial, relative error 9.2e-8; 2^n from its exponent bits.
template <Level level, int lanes>
struct Exponential {
    typedef Floats<lanes> V;
    V least;

    WM_INLINE Exponential make() {
        // GCC takes a maximum with a number that it knows for a comparison and a choice, so it is kept from knowing.
        float number = -88.02f;
        asm("" : "+m"(number));
        return {spread<lanes>(number)};
    }

    __attribute__((always_inline)) V operator()(V x) const {
        // Adding 1.5 · 2^23 rounds to an integer in the low bits, adding 127 makes that the biased exponent of 2^n: for
        // the least x it is 0, and so is 2^n. The order of the arguments of `maximum` lets a NaN through.
        const V shifter = spread<lanes>(12582912.0f + 127.0f);
        const V clamped = maximum(least, x);
        const V rounded = clamped * spread<lanes>(1.44269504f) + shifter;
        const V n = rounded - shifter;
        V r;
        if constexpr (level == Level::kBaseline) {  // perhaps no fused multiply: ln 2 in two parts, one product exact
            r = (clamped - n * spread<lanes>(0.693145752f)) - n * spread<lanes>(1.42860677e-06f);
        } else {  // the constant's own error costs two units at -87, where a second step would cost a tenth of the time
            r = clamped - n * spread<lanes>(0.693147181f);
        }
        V p = spread<lanes>(0.00829027227f);
        p = p * r + spread<lanes>(0.0418981596f);
        p = p * r + spread<lanes>(0.166676381f);
        p = p * r + spread<lanes>(0.499991478f);
        p = p * r + spread<lanes>(0.999999706f);
        p = p * r + spread<lanes>(1.0f);
        return p * (V)((Words32<lanes>)rounded << 23);
    }
};

WM_INLINE Floats<8> lower(Floats<16> v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
WM_INLINE Floats<8> upper(Floats<16> v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }
WM_INLINE Floats<4> lower(Floats<8> v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3); }
WM_INLINE Floats<4> upper(Floats<8> v) { return __builtin_shufflevector(v, v, 4, 5, 6, 7); }

WM_INLINE float sum_of(Floats<4> v) {
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
    return v[0] + v[1];
}
template <typename V>
WM_INLINE float sum_of(V v) {
    return sum_of(lower(v) + upper(v));
}

WM_INLINE float maximum_of(Floats<4> v) {
    v = maximum(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
    return v[0] > v[1] ? v[0] : v[1];
}
template <typename V>
WM_INLINE float maximum_of(V v) {
    return maximum_of(maximum(lower(v), upper(v)));
}

// The last vector of `count` > 0 logits ends with them. Where they are fewer than its lanes it passes through memory of
// our own, and its first lanes hold nothing; where they are more it overlaps the vector before.
template <typename Memory, Level level, int lanes>
WM_INLINE Floats<lanes> read_last(const typename Memory::Type* z, int64_t count) {
    if (count >= lanes) {
        return Memory::template read<level, lanes>(z + count - lanes);
    }
    typename Memory::Type end[lanes] = {};
    for (int64_t i = 0; i < count; ++i) {
        end[lanes - count + i] = z[i];
    }
    return Memory::template read<level, lanes>(end);
}

template <typename Memory, Level level, int lanes>
WM_INLINE void write_last(typename Memory::Type* g, int64_t count, Floats<lanes> v) {
    if (count >= lanes) {
        Memory::template write<level, lanes>(g + count - lanes, v);
        return;
    }
    typename Memory::Type end[lanes];
    Memory::template write<level, lanes>(end, v);
    for (int64_t i = 0; i < count; ++i) {
        g[i] = end[lanes - count + i];
    }
}

// All bits of the last `rest` lanes.
template <int lanes>
WM_INLINE Ints<lanes> last_lanes(int64_t rest) {
    Ints<lanes> index;
    for (int i = 0; i < lanes; ++i) {
        index[i] = i;
    }
    return index >= lanes - static_cast<int32_t>(rest);
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
    float maximum, exponentials, mean;  // Σ exp(z - maximum); Σ z / classes of the row, with label smoothing only
};

// `exponentials` has room for one vector more than `count`: the last vector stands behind the others there.
template <typename Memory, bool smoothing, bool keep, Level level, int lanes>
WM_INLINE Block block_of(const typename Memory::Type* z, int64_t count, float inverse_classes, float* exponentials) {
    typedef Floats<lanes> V;
    const float highest = maximum_over<Memory, level, lanes>(z, count);
    const V top = spread<lanes>(highest == -kInfinity ? 0.0f : highest);
    const V inverse = spread<lanes>(inverse_classes);
    const auto exponential = Exponential<level, lanes>::make();
    V sum0 = {}, sum1 = {}, mean0 = {}, mean1 = {};
    const auto add = [&](V logits, int64_t c, V& sum, V& mean) __attribute__((always_inline)) {
        const V e = exponential(logits - top);
        if (keep) {
            store(exponentials + c, e);
        }
        sum += e;
        if (smoothing) {
            mean += logits * inverse;
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
    V last = {};
    if (whole < count) {  // read before its first lanes may be overwritten
        last = kept ? load<V>(exponentials + whole) : exponential(read_last<Memory, level, lanes>(z, count) - top);
    }
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
        write_last<Memory, level, lanes>(g, count, of(last));
    }
}

template <typename Memory>
typename Memory::Type* row_of(void* gradient, int64_t stride, int64_t row) {
    return static_cast<typename Memory::Type*>(gradient) + row * stride;
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
    float* lse;  // or null
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
    if (results.lse != nullptr) {
        results.lse[row] = 0;
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
        mean += blocks[b].mean;
    }
    const float chosen = Memory::template read_one<level>(z + label);
    const double logarithm = std::log(exponentials), weight = weight_of(problem, row);
    double loss = logarithm + (double(top) - chosen);
    if (problem.label_smoothing != 0) {
        loss += problem.label_smoothing * (chosen - mean);
    }
    results.loss[row] = weight * loss;
    if (results.lse != nullptr) {
        results.lse[row] = static_cast<float>(top + logarithm);
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

// Classes first … last - 1 of one row; the logits there may be overwritten.
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
    const bool chosen_here = label >= first && label < last;
    const float chosen = chosen_here ? Memory::template read_one<level>(z + label) : 0.0f;
    write_gradient<Memory, kept, level, lanes>(z + first, last - first, slope, exponentials, g + first);
    if (chosen_here) {
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

// Where the gradient goes: [rows, classes] of the logits' type, or null.
struct Gradient {
    void* values;
    int64_t stride;
};

// Whole rows begin … end - 1, one after the other: results and, where it is wanted, gradient.
template <typename Memory, bool smoothing>
struct WholeRows {
    template <Level level, int lanes>
    WM_INLINE void work(const CrossEntropyProblem& problem, int64_t begin, int64_t end, double inverse_denominator,
                        Block* blocks, float* exponentials, RowResults results, Gradient gradient) {
        const int64_t classes = problem.classes;
        const float inverse_classes = 1.0f / static_cast<float>(classes);
        const bool wanted = gradient.values != nullptr, keep = wanted && classes <= kBlock;
        for (int64_t row = begin; row < end; ++row) {
            const auto* z = row_of<Memory>(problem, row);
            auto* g = wanted ? row_of<Memory>(gradient.values, gradient.stride, row) : nullptr;
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
                        const Slope* slopes, Gradient gradient) {
        for (int64_t row = begin; row < end; ++row) {
            auto* g = row_of<Memory>(gradient.values, gradient.stride, row);
            if (problem.labels[row] == problem.ignore_index) {
                std::fill(g + first, g + last, typename Memory::Type{});
            } else {
                write_part<Memory, false, level, lanes>(problem, row, first, last, slopes[row], nullptr, g);
            }
        }
    }
};

// Calls f(Memory{}) for the type that the logits have in memory.
template <typename F>
void with_memory(Stored stored, F f) {
    switch (stored) {
        case Stored::kFloat32:
            return f(Float32{});
        case Stored::kFloat16:
            return f(Float16{});
        case Stored::kBfloat16:
            return f(Bfloat16{});
    }
}

template <typename Memory, bool smoothing>
void whole_rows(const CrossEntropyProblem& problem, double inverse_denominator, RowResults results, Gradient gradient) {
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
void write_gradients(const CrossEntropyProblem& problem, const Slope* slopes, Gradient gradient) {
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
void shared_rows(const CrossEntropyProblem& problem, double inverse_denominator, RowResults results,
                 Gradient gradient) {
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
    if (gradient.values != nullptr) {
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
    const RowResults results{row_loss.data(), row_hit.data(), result.lse};
    const Gradient gradient{result.gradient, result.gradient_stride};
    const int threads = thread_count();
    const bool share = threads > 1 && problem.rows < 4 * threads && problem.classes > kTask;
    with_memory(problem.stored, [&](auto memory) {
        typedef decltype(memory) Memory;
        const auto run = [&](auto smoothing) {
            share ? shared_rows<Memory, smoothing>(problem, 1.0 / denominator, results, gradient)
                  : whole_rows<Memory, smoothing>(problem, 1.0 / denominator, results, gradient);
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
    if (result.denominator != nullptr) {
        *result.denominator = static_cast<float>(denominator);
    }
}

void marked_cross_entropy_backward(const CrossEntropyProblem& problem, double factor, const float* lse,
                                   void* gradient) {
    std::vector<Slope> slopes(problem.rows);
    for (int64_t row = 0; row < problem.rows; ++row) {
        slopes[row] = slope_of(problem, weight_of(problem, row) * factor, lse[row], 1.0);
    }
    with_memory(problem.stored, [&](auto memory) {
        write_gradients<decltype(memory)>(problem, slopes.data(), Gradient{gradient, problem.classes});
    });
}

}  // namespace wmengine
