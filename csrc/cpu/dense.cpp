// Dense projections whose matrix is drawn as it is used: random signs, or Gaussian values by Box and Muller.
#include <algorithm>

#include "generator.h"
#include "projection.h"

namespace wmengine {
namespace {

WM_INLINE float sign_dot(const float* w, int rows, const uint32_t (*words)[kLanes]) {
    Float8 a0 = splat(0), a1 = splat(0), a2 = splat(0), a3 = splat(0);
    for (int i = 0; i < rows; ++i) {
        const float* row = w + i * kLanes;
        a0 += flip(load8(row), row_signs(words, i, 0));
        a1 += flip(load8(row + 8), row_signs(words, i, 8));
        a2 += flip(load8(row + 16), row_signs(words, i, 16));
        a3 += flip(load8(row + 24), row_signs(words, i, 24));
    }
    return sum8((a0 + a1) + (a2 + a3));
}

WM_INLINE void sign_add(float g, int rows, const uint32_t (*words)[kLanes], float* out) {
    const Float8 value = splat(g);
    for (int i = 0; i < rows; ++i) {
        float* row = out + i * kLanes;
        for (int lane = 0; lane < kLanes; lane += 8) {
            store8(row + lane, load8(row + lane) + flip(value, row_signs(words, i, lane)));
        }
    }
}

WM_INLINE float gaussian_dot(const float* w, int groups, uint64_t first_group, uint32_t t, uint64_t key) {
    Float8 sum = splat(0);
    for (int group = 0; group < groups; ++group) {
        float values[kGaussianBlock];
        gaussian_group(first_group + group, t, key, values);
        for (int j = 0; j < kGaussianBlock; j += 8) {
            sum += load8(w + group * kGaussianBlock + j) * load8(values + j);
        }
    }
    return sum8(sum);
}

WM_INLINE void gaussian_add(float g, int groups, uint64_t first_group, uint32_t t, uint64_t key, float* out) {
    const Float8 factor = splat(g);
    for (int group = 0; group < groups; ++group) {
        float values[kGaussianBlock];
        gaussian_group(first_group + group, t, key, values);
        for (int j = 0; j < kGaussianBlock; j += 8) {
            float* p = out + group * kGaussianBlock + j;
            store8(p, load8(p) + factor * load8(values + j));
        }
    }
}

struct DenseRun {
    template <Level>
    WM_INLINE void run(const float* w, int64_t first, int64_t count, uint64_t key, Projection kind, int64_t row,
                       int64_t rows, float* sums) {
        float padded[kBlock];
        for (int64_t begin = 0; begin < count; begin += kBlock) {
            const int64_t here = std::min<int64_t>(kBlock, count - begin);
            const uint64_t block = (first + begin) / kBlock;
            const float* values = w + begin;
            if (here < kBlock) {
                std::fill(std::copy(values, values + here, padded), padded + kBlock, 0.0f);
                values = padded;
            }
            if (kind == Projection::kRademacher) {
                const int lane_rows = static_cast<int>((here + kLanes - 1) / kLanes);
                for (int64_t t = 0; t < rows; ++t) {
                    uint32_t words[4][kLanes];
                    block_signs(block, static_cast<uint32_t>(row + t), kDomainDense, key, words);
                    sums[t] += sign_dot(values, lane_rows, words);
                }
            } else {
                const int groups = static_cast<int>((here + kGaussianBlock - 1) / kGaussianBlock);
                for (int64_t t = 0; t < rows; ++t) {
                    sums[t] += gaussian_dot(values, groups, block * (kBlock / kGaussianBlock),
                                            static_cast<uint32_t>(row + t), key);
                }
            }
        }
    }
};

struct DenseAdjointRun {
    template <Level>
    WM_INLINE void run(const float* g, int64_t rows, int64_t first, int64_t count, uint64_t key, Projection kind,
                       bool accumulate, float* out) {
        float sums[kBlock];
        for (int64_t begin = 0; begin < count; begin += kBlock) {
            const int64_t here = std::min<int64_t>(kBlock, count - begin);
            const uint64_t block = (first + begin) / kBlock;
            std::fill(sums, sums + kBlock, 0.0f);
            if (kind == Projection::kRademacher) {
                const int lane_rows = static_cast<int>((here + kLanes - 1) / kLanes);
                for (int64_t t = 0; t < rows; ++t) {
                    uint32_t words[4][kLanes];
                    block_signs(block, static_cast<uint32_t>(t), kDomainDense, key, words);
                    sign_add(g[t], lane_rows, words, sums);
                }
            } else {
                const int groups = static_cast<int>((here + kGaussianBlock - 1) / kGaussianBlock);
                for (int64_t t = 0; t < rows; ++t) {
                    gaussian_add(g[t], groups, block * (kBlock / kGaussianBlock), static_cast<uint32_t>(t), key, sums);
                }
            }
            for (int64_t m = 0; m < here; ++m) {
                out[begin + m] = accumulate ? out[begin + m] + sums[m] : sums[m];
            }
        }
    }
};

}  // namespace

void dense_run(const float* w, int64_t first, int64_t count, uint64_t key, Projection kind, int64_t row, int64_t rows,
               float* sums) {
    dispatch<DenseRun>(w, first, count, key, kind, row, rows, sums);
}

void dense_adjoint_run(const float* g, int64_t rows, int64_t first, int64_t count, uint64_t key, Projection kind,
                       bool accumulate, float* out) {
    dispatch<DenseAdjointRun>(g, rows, first, count, key, kind, accumulate, out);
}

}  // namespace wmengine
