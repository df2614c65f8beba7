// Distances, weights and their sums, a vector of columns at a time. Columns that do not count are computed like the
// others, whatever comes of it, and replaced (Outside).
#include "soft_neighbor_tiles.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "exponential.h"
#include "simd.h"

namespace wmengine::soft_neighbor {
namespace {

constexpr float kNear = 1.0f / 64;  // of the sum of the norms: below, a distance has lost too many bits

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
    return sum_of(sum) + rest;
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
    const V none = spread<lanes>(FLT_MAX), temperature = spread_from<V, level>(&temperature_value);
    V least = none, largest = {};
    tile.near = 0;
    Outside outside(v, I, J);
    for (int64_t r = 0; r < rows; ++r) {
        outside.enter(r);
        float* const d = tile.d + r * kBlock;
        const V own = spread_from<V, level>(row_norms + r);
        V margin = none, row_least = none, row_largest = {};
        for (int64_t c = 0; c < columns; c += lanes) {
            const V norms = own + load<V>(column_norms + c);
            const V value = maximum(norms - 2.0f * load<V>(d + c), V{});
            store(d + c, value);
            // where the norms are below the temperature, what cancels is nothing to the exponent
            const V bound = norms > temperature ? kNear * norms : V{} - 1.0f;
            const V counted = Outside::replaced<lanes, edge>(outside, c, value, none);
            margin = minimum(margin, counted - bound);
            row_least = minimum(row_least, counted);
            row_largest = maximum(row_largest, Outside::replaced<lanes, edge>(outside, c, value, V{}));
        }
        if (minimum_of(margin) <= 0) {
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
                row_least = minimum(row_least, Outside::replaced<lanes, edge>(outside, c, value, none));
                row_largest = maximum(row_largest, Outside::replaced<lanes, edge>(outside, c, value, V{}));
            }
        }
        outside.leave(r);
        least = minimum(least, row_least);
        largest = maximum(largest, row_largest);
    }
    tile.least = minimum_of(least);
    tile.largest = std::max(maximum_of(largest), tile.least);
}

template <Level level, bool edge>
WM_INLINE void sum_distances(const View& v, const Parts& parts, int64_t I, int64_t J, Tile& tile) {
    constexpr int lanes = lanes_of(level);
    using V = Floats<lanes>;
    using Int = Ints<lanes>;
    distances<level, edge>(v, I, J, tile);
    const int64_t rows = rows_of(v, I), columns = rows_of(v, J);
    const int32_t* const row_label = v.label + I * kBlock;
    const int32_t* const column_label = v.label + J * kBlock;
    const float inverse_temperature = v.inverse_temperature;
    const auto exponential = Exponential<level, lanes>::make();
    const V none = spread<lanes>(FLT_MAX), inverse = spread_from<V, level>(&inverse_temperature);
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
            const Int label = spread_from<Int, level>(row_label + r);
            V same_nearest = none, other_nearest = none;
            for (int64_t c = 0; c < columns; c += lanes) {
                const V d = Outside::replaced<lanes, edge>(outside, c, load<V>(tile.d + r * kBlock + c), none);
                const Int same = load<Int>(column_label + c) == label;
                const V if_same = same ? d : none, if_other = same ? none : d;
                same_nearest = minimum(same_nearest, if_same);
                other_nearest = minimum(other_nearest, if_other);
                store(column_same_nearest + c, minimum(load<V>(column_same_nearest + c), if_same));
                store(column_other_nearest + c, minimum(load<V>(column_other_nearest + c), if_other));
            }
            row_same_nearest[r] = minimum_of(same_nearest);
            row_other_nearest[r] = minimum_of(other_nearest);
            outside.leave(r);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        outside.enter(r);
        V row_same = {}, row_other = {};
        const Int label = spread_from<Int, level>(row_label + r);
        const V same_shift = spread_from<V, level>(row_same_nearest + r),
                other_shift = spread_from<V, level>(row_other_nearest + r);
        for (int64_t c = 0; c < columns; c += lanes) {
            const V d = load<V>(tile.d + r * kBlock + c);
            const Int same = load<Int>(column_label + c) == label;
            const V shift = same ? same_shift : other_shift;
            const V e = exponential((shift - d) * inverse);
            const V row = Outside::replaced<lanes, edge>(outside, c, e, V{});
            V column = row;
            if (!narrow) {
                const V other = same ? load<V>(column_same_nearest + c) : load<V>(column_other_nearest + c);
                const V other_e = exponential((other - d) * inverse);
                column = Outside::replaced<lanes, edge>(outside, c, other_e, V{});
            }
            const V row_part = same ? row : V{}, column_part = same ? column : V{};
            row_same += row_part;
            row_other += row - row_part;
            store(column_same + c, load<V>(column_same + c) + column_part);
            store(column_other + c, load<V>(column_other + c) + (column - column_part));
        }
        outside.leave(r);
        parts.row(J, 0, I)[r] = row_same_nearest[r];
        parts.row(J, 1, I)[r] = sum_of(row_same);
        parts.row(J, 2, I)[r] = row_other_nearest[r];
        parts.row(J, 3, I)[r] = sum_of(row_other);
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
        is_edge(*view, I, J) ? sum_distances<level, true>(*view, parts, I, J, *tile)
                             : sum_distances<level, false>(*view, parts, I, J, *tile);
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

template <Level level, bool edge>
WM_INLINE void weigh_distances(const View& v, const SoftNeighborRows& nearest, const GradientSums& sums, int64_t I,
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
    const auto exponential = Exponential<level, lanes>::make();
    const V inverse = spread_from<V, level>(&inverse_temperature), least = spread_from<V, level>(&tile_least);
    Outside outside(v, I, J);
    double distance = 0;
    for (int64_t r = 0; r < rows; ++r) {
        outside.enter(r);
        float* const d = tile.d + r * kBlock;
        const Int label = spread_from<Int, level>(row_label + r);
        const V same_factor = spread_from<V, level>(left.same_factor + r);
        const V other_factor = spread_from<V, level>(left.other_factor + r);
        const V same_nearest = spread_from<V, level>(left.same_nearest + r);
        const V other_nearest = spread_from<V, level>(left.other_nearest + r);
        V sum = {};
        for (int64_t c = 0; c < columns; c += lanes) {
            const V value = load<V>(d + c);
            const Int same = load<Int>(column_label + c) == label;
            const V row_factor = same ? same_factor : other_factor;
            const V column_factor = same ? load<V>(right.same_factor + c) : load<V>(right.other_factor + c);
            V weight;
            if (narrow) {
                weight = exponential((least - value) * inverse) * (row_factor + column_factor);
            } else {
                const V row = same ? same_nearest : other_nearest;
                const V column = same ? load<V>(right.same_nearest + c) : load<V>(right.other_nearest + c);
                weight = exponential((row - value) * inverse) * row_factor +
                         exponential((column - value) * inverse) * column_factor;
            }
            weight = Outside::replaced<lanes, edge>(outside, c, weight, V{});
            sum += weight * Outside::replaced<lanes, edge>(outside, c, value, V{});
            store(d + c, weight);
        }
        outside.leave(r);
        distance += sum_of(sum);
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
        sums.weight[I * kBlock + r] += sum_of(sum);
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
        is_edge(*view, I, J) ? weigh_distances<level, true>(*view, rows, sums, I, J, *tile)
                             : weigh_distances<level, false>(*view, rows, sums, I, J, *tile);
    }
};

}  // namespace

void sum_tile(const View& v, const Parts& parts, int64_t I, int64_t J, Tile& tile) {
    dispatch<SumTile>(&v, parts, I, J, &tile);
}

void gradient_tile(const View& v, const SoftNeighborRows& rows, const GradientSums& sums, int64_t I, int64_t J,
                   Tile& tile) {
    dispatch<GradientTile>(&v, rows, sums, I, J, &tile);
}

}  // namespace wmengine::soft_neighbor
