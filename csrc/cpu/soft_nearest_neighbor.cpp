// Tiles of kBlock × kBlock squared distances, of which only those on and above the diagonal are computed. A tile is a
// product of centred features, n_i + n_j - 2 x_i·x_j; where that cancels, the pair is computed again from the
// difference of the features as they were given, and so is its part of the gradient.
//
// One exponential serves both rows of a pair, exp(-(d - m) / T) with m the least distance of the tile, unless the tile
// spans more than kSpan temperatures: then each row and each column takes its own least distance. Nothing underflows
// that counts, at any temperature.
//
// Order: forward, each tile writes sums of its own, and each row adds them up by tile. Backward, tiles (I, J) with
// (I + J) mod blocks = r run together in round r: every block is in one tile of a round, so a tile owns the gradients
// of its two blocks, and they are added in the order of the rounds whatever the number of threads.
#include "soft_nearest_neighbor.h"

#include <sys/mman.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "exponential.h"
#include "simd.h"
#include "threads.h"

namespace wmengine {
namespace {

constexpr int kWidth = 32;   // features or rows in a panel, whatever the instruction set
constexpr int kBlock = 96;   // rows in a block: a multiple of kWidth and of every kernel's height
constexpr int kPanels = 8;   // panels of features multiplied before the tile is touched: they stay in the L1 cache
constexpr int kChunk = 32;   // panels of the gradient in a task of its own, where there are more
constexpr float kSpan = 80;  // exp(-80) is far from the least normal float
constexpr float kNear = 1.0f / 64;  // of the sum of the norms: below, a distance has lost too many bits

constexpr size_t kHugePage = size_t{1} << 21;

struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

// Large buffers ask for huge pages: fresh memory costs a page fault for every page, and they are used once.
template <typename T>
Buffer<T> allocate(int64_t count) {
    const size_t needed = std::max<size_t>(static_cast<size_t>(count) * sizeof(T), 1);
    const size_t alignment = needed < 2 * kHugePage ? 64 : kHugePage;
    const size_t bytes = (needed + 63) / 64 * 64;
    void* p = nullptr;
    if (posix_memalign(&p, alignment, bytes) != 0) {
        throw std::bad_alloc();
    }
#if defined(MADV_HUGEPAGE)
    if (alignment == kHugePage) {
        madvise(p, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // no more than a wish
    }
#endif
    return Buffer<T>(static_cast<T*>(p));
}

// Pointers into one call's packed input.
struct View {
    const float* features;
    int64_t rows, size, stride, padded_rows, panels, blocks;
    float temperature, inverse_temperature;
    const float* down;     // [panels][padded_rows][kWidth]: centred, kWidth features of every row together
    const float* across;   // [padded_rows / kWidth][panels][kWidth features][kWidth rows]
    const float* norms;    // [padded_rows] squared
    const int32_t* label;  // [padded_rows], equal where the labels are
};

struct Packed {
    Buffer<float> down, across, norms;
    Buffer<int32_t> label;
    std::vector<int64_t> members;  // rows of each label
    View view;
    bool finite;
};

int64_t width_of(const View& v, int64_t panel) { return std::min<int64_t>(kWidth, v.size - panel * kWidth); }

int64_t rows_of(const View& v, int64_t block) { return std::min<int64_t>(kBlock, v.rows - block * kBlock); }

Packed pack(const SoftNeighborProblem& problem) {
    Packed packed;
    View& v = packed.view;
    v.features = problem.features;
    v.rows = problem.rows;
    v.size = problem.size;
    v.stride = problem.stride;
    v.blocks = (v.rows + kBlock - 1) / kBlock;
    v.padded_rows = v.blocks * kBlock;
    v.panels = (v.size + kWidth - 1) / kWidth;
    v.temperature = static_cast<float>(problem.temperature);
    v.inverse_temperature = std::min(static_cast<float>(1.0 / problem.temperature), FLT_MAX);

    packed.label = allocate<int32_t>(v.padded_rows);
    std::vector<int64_t> known(problem.labels, problem.labels + v.rows);
    std::sort(known.begin(), known.end());
    known.erase(std::unique(known.begin(), known.end()), known.end());
    packed.members.assign(known.size(), 0);
    std::fill(packed.label.get(), packed.label.get() + v.padded_rows, -1);
    for (int64_t i = 0; i < v.rows; ++i) {
        const auto place = std::lower_bound(known.begin(), known.end(), problem.labels[i]) - known.begin();
        packed.label[i] = static_cast<int32_t>(place);
        ++packed.members[place];
    }

    packed.down = allocate<float>(v.panels * v.padded_rows * kWidth);
    packed.across = allocate<float>(v.panels * v.padded_rows * kWidth);
    packed.norms = allocate<float>(v.padded_rows);
    float* const down = packed.down.get();
    float* const across = packed.across.get();
    parallel_for(v.panels, [&, down, across](int64_t panel) {
        const int64_t width = width_of(v, panel);
        const float* const x = v.features + panel * kWidth;
        double center[kWidth] = {};
        for (int64_t i = 0; i < v.rows; ++i) {
            for (int64_t c = 0; c < width; ++c) {
                center[c] += x[i * v.stride + c];
            }
        }
        float middle[kWidth] = {};
        for (int64_t c = 0; c < width; ++c) {
            middle[c] = static_cast<float>(center[c] / static_cast<double>(v.rows));
        }
        float* const own = down + panel * v.padded_rows * kWidth;
        std::fill(own, own + v.padded_rows * kWidth, 0.0f);
        for (int64_t i = 0; i < v.rows; ++i) {
            for (int64_t c = 0; c < width; ++c) {
                own[i * kWidth + c] = x[i * v.stride + c] - middle[c];
            }
        }
        for (int64_t group = 0; group < v.padded_rows / kWidth; ++group) {
            const float* const from = own + group * kWidth * kWidth;
            float* const to = across + (group * v.panels + panel) * kWidth * kWidth;
            for (int64_t c = 0; c < kWidth; ++c) {
                for (int64_t i = 0; i < kWidth; ++i) {
                    to[c * kWidth + i] = from[i * kWidth + c];
                }
            }
        }
    });
    parallel_for(v.blocks, [&, down](int64_t block) {
        double norms[kBlock] = {};
        for (int64_t panel = 0; panel < v.panels; ++panel) {
            const float* const x = down + (panel * v.padded_rows + block * kBlock) * kWidth;
            for (int64_t i = 0; i < kBlock; ++i) {
                float sum = 0;
                for (int64_t c = 0; c < kWidth; ++c) {
                    sum += x[i * kWidth + c] * x[i * kWidth + c];
                }
                norms[i] += sum;
            }
        }
        std::copy(norms, norms + kBlock, packed.norms.get() + block * kBlock);
    });
    packed.finite = true;
    for (int64_t i = 0; i < v.rows; ++i) {
        packed.finite = packed.finite && packed.norms[i] < FLT_MAX / 8;
    }
    v.down = down;
    v.across = across;
    v.norms = packed.norms.get();
    v.label = packed.label.get();
    return packed;
}

// One number in every lane. GCC lowers every vector made of a scalar lane by lane before it knows the instruction set
// (helpers are compiled for the baseline until they are inlined), which costs more than the arithmetic.
template <typename Vector, Level level, typename T>
WM_INLINE Vector repeat(const T* x) {
    static_assert(sizeof(T) == 4 && sizeof(Vector) == 4 * lanes_of(level));
#if defined(WM_X86_64) && !defined(__clang__)
    if constexpr (level != Level::kBaseline) {
        Vector v;
        __asm__("vbroadcastss %1, %0" : "=v"(v) : "m"(*x));
        return v;
    }
#endif
    return *x - Vector{};
}

// The sums of one micro-tile: `height` rows, two vectors of columns.
template <int lanes>
constexpr int height_of() {
    return lanes == 16 ? 12 : 6;
}

template <int lanes, int height>
struct Sums {
    Floats<lanes> of[height][2];
};

// sums[r] += Σ_k a[r·row_step + k·step] · b[k·kWidth …]
template <Level level, int height>
WM_INLINE void multiply(Sums<lanes_of(level), height>& sums, const float* a, int64_t row_step, int64_t step,
                        const float* b, int64_t count) {
    constexpr int lanes = lanes_of(level);
    using V = Floats<lanes>;
    for (int64_t k = 0; k < count; ++k) {
        const V left = load<V>(b + k * kWidth), right = load<V>(b + k * kWidth + lanes);
#pragma GCC unroll 12
        for (int r = 0; r < height; ++r) {
            const V x = repeat<V, level>(a + r * row_step + k * step);
            sums.of[r][0] += x * left;
            sums.of[r][1] += x * right;
        }
    }
}

template <int lanes, int height>
WM_INLINE void clear(Sums<lanes, height>& sums) {
#pragma GCC unroll 12
    for (int r = 0; r < height; ++r) {
        sums.of[r][0] = Floats<lanes>{};
        sums.of[r][1] = Floats<lanes>{};
    }
}

// out[r·step …] += sums, or = sums where `fresh`
template <int lanes, int height>
WM_INLINE void deposit(const Sums<lanes, height>& sums, float* out, int64_t step, bool fresh) {
    using V = Floats<lanes>;
#pragma GCC unroll 12
    for (int r = 0; r < height; ++r) {
        float* const row = out + r * step;
        store(row, fresh ? sums.of[r][0] : load<V>(row) + sums.of[r][0]);
        store(row + lanes, fresh ? sums.of[r][1] : load<V>(row + lanes) + sums.of[r][1]);
    }
}

// tile[kBlock][kBlock] = x_i·x_j of blocks I and J
template <Level level>
WM_INLINE void products(const View& v, int64_t I, int64_t J, float* tile) {
    constexpr int lanes = lanes_of(level), height = height_of<lanes>();
    const int64_t rows = rows_of(v, I), columns = rows_of(v, J);
    for (int64_t first = 0; first < std::max<int64_t>(v.panels, 1); first += kPanels) {
        const int64_t last = std::min(first + kPanels, v.panels);
        for (int64_t c = 0; c < columns; c += 2 * lanes) {
            const int64_t group = J * (kBlock / kWidth) + c / kWidth;
            const float* const b = v.across + group * v.panels * kWidth * kWidth + c % kWidth;
            for (int64_t r = 0; r < rows; r += height) {
                Sums<lanes, height> sums;
                clear(sums);
                for (int64_t panel = first; panel < last; ++panel) {
                    const float* const a = v.down + (panel * v.padded_rows + I * kBlock + r) * kWidth;
                    multiply<level>(sums, a, kWidth, 1, b + panel * kWidth * kWidth, width_of(v, panel));
                }
                deposit(sums, tile + r * kBlock + c, kBlock, first == 0);
            }
        }
    }
}

// out[panels][padded_rows][kWidth], rows of block I and panels begin … end, += W·x_J; W[i][j] = tile[i·row_step +
// j·step]
template <Level level>
WM_INLINE void add_weighted(const View& v, int64_t I, int64_t J, const float* tile, int64_t row_step, int64_t step,
                            int64_t begin, int64_t end, float* out) {
    constexpr int lanes = lanes_of(level), height = height_of<lanes>();
    const int64_t rows = rows_of(v, I), columns = rows_of(v, J);
    for (int64_t panel = begin; panel < end; ++panel) {
        for (int64_t c = 0; c < width_of(v, panel); c += 2 * lanes) {
            const float* const b = v.down + (panel * v.padded_rows + J * kBlock) * kWidth + c;
            float* const to = out + (panel * v.padded_rows + I * kBlock) * kWidth + c;
            for (int64_t r = 0; r < rows; r += height) {
                Sums<lanes, height> sums;
                clear(sums);
                multiply<level>(sums, tile + r * row_step, row_step, step, b, columns);
                deposit(sums, to + r * kWidth, kWidth, false);
            }
        }
    }
}

struct Products {
    template <Level level>
    WM_INLINE void run(const View* view, int64_t I, int64_t J, float* tile) {
        products<level>(*view, I, J, tile);
    }
};

struct AddWeighted {
    template <Level level>
    WM_INLINE void run(const View* view, int64_t I, int64_t J, const float* tile, bool transposed, int64_t begin,
                       int64_t end, float* out) {
        transposed ? add_weighted<level>(*view, I, J, tile, 1, kBlock, begin, end, out)
                   : add_weighted<level>(*view, I, J, tile, kBlock, 1, begin, end, out);
    }
};

template <int lanes>
WM_INLINE float sum_of(Floats<lanes> v) {
    float sum = 0;
    for (int i = 0; i < lanes; i += 4) {
        sum += (v[i] + v[i + 1]) + (v[i + 2] + v[i + 3]);
    }
    return sum;
}

template <int lanes>
WM_INLINE float least_of(Floats<lanes> v) {
    float least = v[0];
    for (int i = 1; i < lanes; ++i) {
        least = std::min(least, v[i]);
    }
    return least;
}

template <int lanes>
WM_INLINE float largest_of(Floats<lanes> v) {
    float largest = v[0];
    for (int i = 1; i < lanes; ++i) {
        largest = std::max(largest, v[i]);
    }
    return largest;
}

template <int lanes>
WM_INLINE Floats<lanes> minimum(Floats<lanes> a, Floats<lanes> b) {
    return a < b ? a : b;
}

template <int lanes>
WM_INLINE Floats<lanes> select(Ints<lanes> mask, Floats<lanes> a, Floats<lanes> b) {
    return mask ? a : b;
}

// Σ (x_i - x_j)² of the features as they were given
template <int lanes>
WM_INLINE float exact_distance(const View& v, int64_t i, int64_t j) {
    using V = Floats<lanes>;
    const float* const x = v.features + i * v.stride;
    const float* const y = v.features + j * v.stride;
    V sum = {};
    int64_t k = 0;
    for (; k + lanes <= v.size; k += lanes) {
        const V difference = load<V>(x + k) - load<V>(y + k);
        sum += difference * difference;
    }
    float rest = 0;
    for (; k < v.size; ++k) {
        rest += (x[k] - y[k]) * (x[k] - y[k]);
    }
    return sum_of<lanes>(sum) + rest;
}

// out_i += w·(x_j - x_i) and, where `both`, out_j += w·(x_i - x_j): a near pair's part of W·x - rowsum(W)·x
template <int lanes>
WM_INLINE void add_difference(const View& v, int64_t i, int64_t j, float w, bool both, float* out) {
    using V = Floats<lanes>;
    for (int64_t panel = 0; panel < v.panels; ++panel) {
        const int64_t width = width_of(v, panel);
        const float* x = v.features + i * v.stride + panel * kWidth;
        const float* y = v.features + j * v.stride + panel * kWidth;
        float left[kWidth], right[kWidth];
        if (width < kWidth) {
            std::fill(left, left + kWidth, 0.0f);
            std::fill(right, right + kWidth, 0.0f);
            std::copy(x, x + width, left);
            std::copy(y, y + width, right);
            x = left;
            y = right;
        }
        float* const own = out + (panel * v.padded_rows + i) * kWidth;
        float* const partner = out + (panel * v.padded_rows + j) * kWidth;
        for (int64_t c = 0; c < kWidth; c += lanes) {
            const V part = w * (load<V>(y + c) - load<V>(x + c));
            store(own + c, load<V>(own + c) + part);
            if (both) {
                store(partner + c, load<V>(partner + c) - part);
            }
        }
    }
}

struct Tile {
    alignas(64) float d[kBlock * kBlock];  // x_i·x_j, then distances, then weights
    float least, largest;                  // over the pairs that count
    int64_t near;                          // pairs computed from the difference of their features: places in d
    uint16_t near_at[kBlock * kBlock];

    bool narrow(const View& v) const { return (largest - least) * v.inverse_temperature <= kSpan; }
};

// -1 at the columns of tile (I, J) that a row does not pair with: itself, and columns past the end. Read from memory,
// because compilers of AVX-512 combine comparisons lane by lane.
struct Outside {
    alignas(64) int32_t column[kBlock];
    bool diagonal;

    Outside(const View& v, int64_t I, int64_t J) : diagonal(I == J) {
        const int64_t columns = rows_of(v, J);
        for (int64_t c = 0; c < kBlock; ++c) {
            column[c] = c < columns ? 0 : -1;
        }
    }

    void enter(int64_t row) {
        if (diagonal) {
            column[row] = -1;
        }
    }

    void leave(int64_t row) {
        if (diagonal) {
            column[row] = 0;
        }
    }

    // `otherwise` in the lanes that do not count
    template <int lanes, bool edge>
    WM_INLINE Floats<lanes> replaced(const Outside& outside, int64_t c, Floats<lanes> value, Floats<lanes> otherwise) {
        if (!edge) {
            return value;
        }
        return load<Ints<lanes>>(outside.column + c) ? otherwise : value;
    }
};

template <Level level, bool edge>
WM_INLINE void distances(const View& v, int64_t I, int64_t J, Tile& tile) {
    constexpr int lanes = lanes_of(level);
    using V = Floats<lanes>;
    const int64_t rows = rows_of(v, I), columns = rows_of(v, J);
    const float* const row_norms = v.norms + I * kBlock;
    const float* const column_norms = v.norms + J * kBlock;
    const float temperature_value = v.temperature;
    const V none = spread<lanes>(FLT_MAX), temperature = repeat<V, level>(&temperature_value);
    V least = none, largest = {};
    tile.near = 0;
    Outside outside(v, I, J);
    for (int64_t r = 0; r < rows; ++r) {
        outside.enter(r);
        float* const d = tile.d + r * kBlock;
        const V own = repeat<V, level>(row_norms + r);
        V margin = none, row_least = none, row_largest = {};
        for (int64_t c = 0; c < columns; c += lanes) {
            const V norms = own + load<V>(column_norms + c);
            const V value = maximum(norms - 2.0f * load<V>(d + c), V{});
            store(d + c, value);
            // where the norms are below the temperature, what cancels is nothing to the exponent
            const V bound = norms > temperature ? kNear * norms : V{} - 1.0f;
            const V counted = Outside::replaced<lanes, edge>(outside, c, value, none);
            margin = minimum<lanes>(margin, counted - bound);
            row_least = minimum<lanes>(row_least, counted);
            row_largest = maximum(row_largest, Outside::replaced<lanes, edge>(outside, c, value, V{}));
        }
        if (least_of<lanes>(margin) <= 0) {
            for (int64_t c = 0; c < columns; ++c) {
                const float norms = row_norms[r] + column_norms[c];
                if (d[c] <= kNear * norms && norms > temperature_value && !(I == J && r == c)) {
                    d[c] = exact_distance<lanes>(v, I * kBlock + r, J * kBlock + c);
                    tile.near_at[tile.near++] = static_cast<uint16_t>(r * kBlock + c);
                }
            }
            row_least = none, row_largest = V{};
            for (int64_t c = 0; c < columns; c += lanes) {
                const V value = load<V>(d + c);
                row_least = minimum<lanes>(row_least, Outside::replaced<lanes, edge>(outside, c, value, none));
                row_largest = maximum(row_largest, Outside::replaced<lanes, edge>(outside, c, value, V{}));
            }
        }
        outside.leave(r);
        least = minimum<lanes>(least, row_least);
        largest = maximum(largest, row_largest);
    }
    tile.least = least_of<lanes>(least);
    tile.largest = std::max(largest_of<lanes>(largest), tile.least);
}

// What a tile adds to the two sums of its rows: the sum of exp(-(d - nearest) / T) over the pairs of one kind.
struct Parts {
    float* at;  // [blocks][4][padded_rows]: same_nearest, same_sum, other_nearest, other_sum, by the other block
    int64_t padded_rows;

    float* row(int64_t other, int kind, int64_t block) const {
        return at + (other * 4 + kind) * padded_rows + block * kBlock;
    }
};

template <Level level, bool edge>
WM_INLINE void sum_tile(const View& v, const Parts& parts, int64_t I, int64_t J, Tile& tile) {
    constexpr int lanes = lanes_of(level);
    using V = Floats<lanes>;
    using Int = Ints<lanes>;
    distances<level, edge>(v, I, J, tile);
    const int64_t rows = rows_of(v, I), columns = rows_of(v, J);
    const int32_t* const row_label = v.label + I * kBlock;
    const int32_t* const column_label = v.label + J * kBlock;
    const float inverse_temperature = v.inverse_temperature;
    const V none = spread<lanes>(FLT_MAX), inverse = repeat<V, level>(&inverse_temperature);
    alignas(64) float column_same_nearest[kBlock], column_other_nearest[kBlock];
    alignas(64) float column_same[kBlock] = {}, column_other[kBlock] = {};
    float row_same_nearest[kBlock], row_other_nearest[kBlock];
    const bool narrow = tile.narrow(v);
    std::fill(column_same_nearest, column_same_nearest + kBlock, narrow ? tile.least : FLT_MAX);
    std::fill(column_other_nearest, column_other_nearest + kBlock, narrow ? tile.least : FLT_MAX);
    std::fill(row_same_nearest, row_same_nearest + kBlock, tile.least);
    std::fill(row_other_nearest, row_other_nearest + kBlock, tile.least);
    Outside outside(v, I, J);
    if (!narrow) {
        for (int64_t r = 0; r < rows; ++r) {
            outside.enter(r);
            const Int label = repeat<Int, level>(row_label + r);
            V same_nearest = none, other_nearest = none;
            for (int64_t c = 0; c < columns; c += lanes) {
                const V d = Outside::replaced<lanes, edge>(outside, c, load<V>(tile.d + r * kBlock + c), none);
                const Int same = load<Int>(column_label + c) == label;
                const V if_same = select<lanes>(same, d, none), if_other = select<lanes>(same, none, d);
                same_nearest = minimum<lanes>(same_nearest, if_same);
                other_nearest = minimum<lanes>(other_nearest, if_other);
                store(column_same_nearest + c, minimum<lanes>(load<V>(column_same_nearest + c), if_same));
                store(column_other_nearest + c, minimum<lanes>(load<V>(column_other_nearest + c), if_other));
            }
            row_same_nearest[r] = least_of<lanes>(same_nearest);
            row_other_nearest[r] = least_of<lanes>(other_nearest);
            outside.leave(r);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        outside.enter(r);
        V row_same = {}, row_other = {};
        const Int label = repeat<Int, level>(row_label + r);
        const V same_shift = repeat<V, level>(row_same_nearest + r),
                other_shift = repeat<V, level>(row_other_nearest + r);
        for (int64_t c = 0; c < columns; c += lanes) {
            const V d = load<V>(tile.d + r * kBlock + c);
            const Int same = load<Int>(column_label + c) == label;
            const V shift = select<lanes>(same, same_shift, other_shift);
            const V e = exponential_of_number<lanes>((shift - d) * inverse);
            const V row = Outside::replaced<lanes, edge>(outside, c, e, V{});
            V column = row;
            if (!narrow) {
                const V other =
                    select<lanes>(same, load<V>(column_same_nearest + c), load<V>(column_other_nearest + c));
                const V other_e = exponential_of_number<lanes>((other - d) * inverse);
                column = Outside::replaced<lanes, edge>(outside, c, other_e, V{});
            }
            const V row_part = select<lanes>(same, row, V{}), column_part = select<lanes>(same, column, V{});
            row_same += row_part;
            row_other += row - row_part;
            store(column_same + c, load<V>(column_same + c) + column_part);
            store(column_other + c, load<V>(column_other + c) + (column - column_part));
        }
        outside.leave(r);
        parts.row(J, 0, I)[r] = row_same_nearest[r];
        parts.row(J, 1, I)[r] = sum_of<lanes>(row_same);
        parts.row(J, 2, I)[r] = row_other_nearest[r];
        parts.row(J, 3, I)[r] = sum_of<lanes>(row_other);
    }
    if (I != J) {
        std::copy(column_same_nearest, column_same_nearest + columns, parts.row(I, 0, J));
        std::copy(column_same, column_same + columns, parts.row(I, 1, J));
        std::copy(column_other_nearest, column_other_nearest + columns, parts.row(I, 2, J));
        std::copy(column_other, column_other + columns, parts.row(I, 3, J));
    }
}

bool is_edge(const View& v, int64_t I, int64_t J) { return I == J || rows_of(v, J) < kBlock; }

struct SumTile {
    template <Level level>
    WM_INLINE void run(const View* view, Parts parts, int64_t I, int64_t J, Tile* tile) {
        is_edge(*view, I, J) ? sum_tile<level, true>(*view, parts, I, J, *tile)
                             : sum_tile<level, false>(*view, parts, I, J, *tile);
    }
};

// Both blocks' rows: in a gradient tile, exp(-(d - m) / T)·factor is what d weighs to the row, m the tile's least.
struct Side {
    alignas(64) float same_nearest[kBlock], same_factor[kBlock], other_nearest[kBlock], other_factor[kBlock];
};

WM_INLINE void prepare(const View& v, const SoftNeighborRows& rows, int64_t block, const Tile& tile, Side& side) {
    const int64_t first = block * kBlock, count = rows_of(v, block);
    std::fill(side.same_factor, side.same_factor + kBlock, 0.0f);
    std::fill(side.other_factor, side.other_factor + kBlock, 0.0f);
    std::fill(side.same_nearest, side.same_nearest + kBlock, 0.0f);
    std::fill(side.other_nearest, side.other_nearest + kBlock, 0.0f);
    for (int64_t i = 0; i < count; ++i) {
        side.same_nearest[i] = rows.same_nearest[first + i];
        side.other_nearest[i] = rows.other_nearest[first + i];
        side.same_factor[i] = rows.same_weight[first + i];
        side.other_factor[i] = -rows.other_weight[first + i];
    }
    if (tile.narrow(v)) {
        // Beyond kSpan there is no pair of that kind in the tile, and the factor is not used.
        const auto shifted = [&](float nearest) {
            return std::exp(std::min((nearest - tile.least) * v.inverse_temperature, kSpan));
        };
        for (int64_t i = 0; i < count; ++i) {
            side.same_factor[i] *= shifted(side.same_nearest[i]);
            side.other_factor[i] *= shifted(side.other_nearest[i]);
        }
    }
}

struct GradientSums {
    float* weighted;   // Σ_j W_ij x_j, packed as View::down; null: not wanted
    double* weight;    // [padded_rows] Σ_j W_ij
    double* distance;  // [blocks][blocks] Σ W_ij d_ij of a tile
};

template <Level level, bool edge>
WM_INLINE void gradient_tile(const View& v, const SoftNeighborRows& nearest, const GradientSums& sums, int64_t I,
                             int64_t J, Tile& tile) {
    constexpr int lanes = lanes_of(level);
    using V = Floats<lanes>;
    using Int = Ints<lanes>;
    distances<level, edge>(v, I, J, tile);
    const int64_t rows = rows_of(v, I), columns = rows_of(v, J);
    const int32_t* const row_label = v.label + I * kBlock;
    const int32_t* const column_label = v.label + J * kBlock;
    Side left, right;
    prepare(v, nearest, I, tile, left);
    prepare(v, nearest, J, tile, right);
    const bool narrow = tile.narrow(v);
    const float inverse_temperature = v.inverse_temperature, tile_least = tile.least;
    const V inverse = repeat<V, level>(&inverse_temperature), least = repeat<V, level>(&tile_least);
    Outside outside(v, I, J);
    double distance = 0;
    for (int64_t r = 0; r < rows; ++r) {
        outside.enter(r);
        float* const d = tile.d + r * kBlock;
        const Int label = repeat<Int, level>(row_label + r);
        const V same_factor = repeat<V, level>(left.same_factor + r);
        const V other_factor = repeat<V, level>(left.other_factor + r);
        const V same_nearest = repeat<V, level>(left.same_nearest + r);
        const V other_nearest = repeat<V, level>(left.other_nearest + r);
        V sum = {};
        for (int64_t c = 0; c < columns; c += lanes) {
            const V value = load<V>(d + c);
            const Int same = load<Int>(column_label + c) == label;
            const V row_factor = select<lanes>(same, same_factor, other_factor);
            const V column_factor =
                select<lanes>(same, load<V>(right.same_factor + c), load<V>(right.other_factor + c));
            V weight;
            if (narrow) {
                weight = exponential_of_number<lanes>((least - value) * inverse) * (row_factor + column_factor);
            } else {
                const V row = select<lanes>(same, same_nearest, other_nearest);
                const V column = select<lanes>(same, load<V>(right.same_nearest + c), load<V>(right.other_nearest + c));
                weight = exponential_of_number<lanes>((row - value) * inverse) * row_factor +
                         exponential_of_number<lanes>((column - value) * inverse) * column_factor;
            }
            weight = Outside::replaced<lanes, edge>(outside, c, weight, V{});
            sum += weight * Outside::replaced<lanes, edge>(outside, c, value, V{});
            store(d + c, weight);
        }
        outside.leave(r);
        distance += sum_of<lanes>(sum);
    }
    sums.distance[I * v.blocks + J] = I == J ? 0.5 * distance : distance;
    if (sums.weighted == nullptr) {
        return;
    }
    for (int64_t n = 0; n < tile.near; ++n) {
        const int64_t r = tile.near_at[n] / kBlock, c = tile.near_at[n] % kBlock;
        add_difference<lanes>(v, I * kBlock + r, J * kBlock + c, tile.d[tile.near_at[n]], I != J, sums.weighted);
        tile.d[tile.near_at[n]] = 0;
    }
    alignas(64) float column_sums[kBlock] = {};
    for (int64_t r = 0; r < rows; ++r) {
        V sum = {};
        for (int64_t c = 0; c < columns; c += lanes) {
            const V weight = load<V>(tile.d + r * kBlock + c);
            sum += weight;
            store(column_sums + c, load<V>(column_sums + c) + weight);
        }
        sums.weight[I * kBlock + r] += sum_of<lanes>(sum);
    }
    if (I != J) {
        for (int64_t c = 0; c < columns; ++c) {
            sums.weight[J * kBlock + c] += column_sums[c];
        }
    }
}

struct GradientTile {
    template <Level level>
    WM_INLINE void run(const View* view, SoftNeighborRows rows, GradientSums sums, int64_t I, int64_t J, Tile* tile) {
        is_edge(*view, I, J) ? gradient_tile<level, true>(*view, rows, sums, I, J, *tile)
                             : gradient_tile<level, false>(*view, rows, sums, I, J, *tile);
    }
};

}  // namespace

double soft_nearest_neighbor(const SoftNeighborProblem& problem, const SoftNeighborRows& result) {
    const Packed packed = pack(problem);
    const View& v = packed.view;
    for (float* each : {result.same_nearest, result.same_weight, result.other_nearest, result.other_weight}) {
        std::fill(each, each + v.rows, packed.finite ? 0.0f : NAN);
    }
    if (!packed.finite) {
        return std::numeric_limits<double>::quiet_NaN();
    }
    const Buffer<float> memory = allocate<float>(v.blocks * 4 * v.padded_rows);
    const Parts parts{memory.get(), v.padded_rows};
    parallel_for(v.blocks * (v.blocks + 1) / 2, [&](int64_t tile) {
        int64_t I = 0;
        for (; tile >= v.blocks - I; ++I) {
            tile -= v.blocks - I;
        }
        Tile distances;
        dispatch<Products>(&v, I, I + tile, distances.d);
        dispatch<SumTile>(&v, parts, I, I + tile, &distances);
    });

    const Buffer<double> losses = allocate<double>(v.padded_rows);
    parallel_for(v.blocks, [&](int64_t block) {
        for (int64_t r = 0; r < rows_of(v, block); ++r) {
            const int64_t i = block * kBlock + r;
            losses[i] = 0;
            double sums[2] = {0, 0};
            float nearest[2] = {FLT_MAX, FLT_MAX};
            for (int kind = 0; kind < 2; ++kind) {
                for (int64_t other = 0; other < v.blocks; ++other) {
                    if (parts.row(other, 2 * kind + 1, block)[r] > 0) {
                        nearest[kind] = std::min(nearest[kind], parts.row(other, 2 * kind, block)[r]);
                    }
                }
                for (int64_t other = 0; other < v.blocks; ++other) {
                    const float sum = parts.row(other, 2 * kind + 1, block)[r];
                    if (sum > 0) {
                        const double behind = parts.row(other, 2 * kind, block)[r] - nearest[kind];
                        sums[kind] += sum * std::exp(-behind * v.inverse_temperature);
                    }
                }
            }
            if (sums[0] > 0 && sums[1] > 0) {
                // the other labels' sum over the own label's, in logarithms
                const double ratio = (static_cast<double>(nearest[0]) - nearest[1]) * v.inverse_temperature +
                                     std::log(sums[1]) - std::log(sums[0]);
                losses[i] = std::max(ratio, 0.0) + std::log1p(std::exp(-std::fabs(ratio)));
                const double share = 1 / (1 + std::exp(-ratio));
                result.same_nearest[i] = nearest[0];
                result.same_weight[i] = static_cast<float>(share / sums[0]);
                result.other_nearest[i] = nearest[1];
                result.other_weight[i] = static_cast<float>(share / sums[1]);
            }
        }
    });
    double loss = 0;
    int64_t counted = 0;
    for (int64_t i = 0; i < v.rows; ++i) {
        loss += losses[i];
        counted += packed.members[packed.label[i]] > 1;
    }
    return counted > 0 ? loss / static_cast<double>(counted) : 0;
}

double soft_nearest_neighbor_backward(const SoftNeighborProblem& problem, const SoftNeighborRows& rows, double factor,
                                      float* gradient) {
    const Packed packed = pack(problem);
    const View& v = packed.view;
    if (!packed.finite) {
        if (gradient != nullptr) {
            std::fill(gradient, gradient + v.rows * v.size, NAN);
        }
        return std::numeric_limits<double>::quiet_NaN();
    }
    int64_t counted = 0;
    for (int64_t i = 0; i < v.rows; ++i) {
        counted += packed.members[packed.label[i]] > 1;
    }
    const bool wanted = gradient != nullptr;
    const Buffer<float> weighted = allocate<float>(wanted ? v.panels * v.padded_rows * kWidth : 0);
    const Buffer<double> weight = allocate<double>(v.padded_rows);
    const Buffer<double> distance = allocate<double>(v.blocks * v.blocks);
    std::fill(weight.get(), weight.get() + v.padded_rows, 0.0);
    if (wanted) {
        parallel_for(v.panels, [&](int64_t panel) {
            float* const own = weighted.get() + panel * v.padded_rows * kWidth;
            std::fill(own, own + v.padded_rows * kWidth, 0.0f);
        });
    }
    const int64_t chunks = (v.panels + kChunk - 1) / kChunk;
    const auto add = [&](int64_t I, int64_t J, const Tile& tile, int64_t chunk) {
        const int64_t begin = chunk * kChunk, end = std::min(begin + kChunk, v.panels);
        dispatch<AddWeighted>(&v, I, J, static_cast<const float*>(tile.d), false, begin, end, weighted.get());
        if (I != J) {
            dispatch<AddWeighted>(&v, J, I, static_cast<const float*>(tile.d), true, begin, end, weighted.get());
        }
    };
    const Buffer<Tile> tiles = allocate<Tile>(v.blocks / 2 + 1);
    const GradientSums sums{wanted ? weighted.get() : nullptr, weight.get(), distance.get()};
    for (int64_t round = 0; round < v.blocks; ++round) {
        std::vector<int64_t> firsts;  // of the pairs of blocks I <= J with (I + J) mod blocks = round
        for (int64_t I = 0; I < v.blocks; ++I) {
            if (I <= (round - I + v.blocks) % v.blocks) {
                firsts.push_back(I);
            }
        }
        const int64_t pairs = static_cast<int64_t>(firsts.size());
        parallel_for(pairs, [&](int64_t place) {
            const int64_t I = firsts[place], J = (round - I + v.blocks) % v.blocks;
            dispatch<Products>(&v, I, J, tiles[place].d);
            dispatch<GradientTile>(&v, rows, sums, I, J, &tiles[place]);
            if (wanted && chunks == 1) {  // while the tile is in this processor's cache
                add(I, J, tiles[place], 0);
            }
        });
        if (wanted && chunks > 1) {
            parallel_for(pairs * chunks, [&](int64_t task) {
                const int64_t I = firsts[task / chunks], J = (round - I + v.blocks) % v.blocks;
                add(I, J, tiles[task / chunks], task % chunks);
            });
        }
    }
    const double mean = counted > 0 ? factor / static_cast<double>(counted) : 0.0;
    const double scale = 2 * mean * v.inverse_temperature;
    if (wanted) {
        parallel_for(v.blocks, [&](int64_t block) {
            for (int64_t i = block * kBlock; i < block * kBlock + rows_of(v, block); ++i) {
                const float own = static_cast<float>(scale * weight[i]), others = static_cast<float>(scale);
                for (int64_t panel = 0; panel < v.panels; ++panel) {
                    const int64_t at = (panel * v.padded_rows + i) * kWidth;
                    for (int64_t c = 0; c < width_of(v, panel); ++c) {
                        gradient[i * v.size + panel * kWidth + c] = own * v.down[at + c] - others * weighted[at + c];
                    }
                }
            }
        });
    }
    double by_temperature = 0;
    for (int64_t I = 0; I < v.blocks; ++I) {
        for (int64_t J = I; J < v.blocks; ++J) {
            by_temperature += distance[I * v.blocks + J];
        }
    }
    return -mean * v.inverse_temperature * v.inverse_temperature * by_temperature;
}

}  // namespace wmengine
