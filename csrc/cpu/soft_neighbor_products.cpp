// A micro-tile of sums stays in registers: for each feature, `height` numbers are spread and multiplied by two vectors.
#include "soft_neighbor_products.h"

#include <cfloat>

#include "simd.h"
#include "threads.h"

namespace wmengine::soft_neighbor {
namespace {

constexpr int kPanels = 8;  // panels of features multiplied before the tile is touched: they stay in the L1 cache

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
            const V x = spread_from<V, level>(a + r * row_step + k * step);
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

struct Products {
    template <Level level>
    WM_INLINE void run(const View* view, int64_t I, int64_t J, float* tile) {
        const View& v = *view;
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
};

// add_weighted with W[i][j] = tile[i·row_step + j·step]; the steps are known when it is compiled.
template <Level level, int row_step, int step>
WM_INLINE void add_products(const View& v, int64_t I, int64_t J, const float* tile, int64_t begin, int64_t end,
                            float* out) {
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

struct AddWeighted {
    template <Level level>
    WM_INLINE void run(const View* view, int64_t I, int64_t J, const float* tile, bool transposed, int64_t begin,
                       int64_t end, float* out) {
        transposed ? add_products<level, 1, kBlock>(*view, I, J, tile, begin, end, out)
                   : add_products<level, kBlock, 1>(*view, I, J, tile, begin, end, out);
    }
};

}  // namespace

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

void products(const View& v, int64_t I, int64_t J, float* tile) { dispatch<Products>(&v, I, J, tile); }

void add_weighted(const View& v, int64_t I, int64_t J, const float* tile, bool transposed, int64_t begin, int64_t end,
                  float* out) {
    dispatch<AddWeighted>(&v, I, J, tile, transposed, begin, end, out);
}

}  // namespace wmengine::soft_neighbor
