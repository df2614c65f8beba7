// Partial projections of a run of weights, and their adjoints: what one task of every operator here computes.
#pragma once

#include <cstdint>

#include "layout.h"

namespace wmengine {

enum class Projection : int { kSketch = 0, kRademacher = 1, kGaussian = 2 };

// sums[buckets] += Σ σ(m) w_m by bucket, over weights first … first + count of a carrier; `first` starts a block.
void sketch_run(const float* w, int64_t first, int64_t count, uint64_t key, int64_t buckets, float* sums);

// out[m - first] (+)= σ(m) g[bucket(m)].
void sketch_adjoint_run(const float* g, int64_t first, int64_t count, uint64_t key, int64_t buckets, bool accumulate,
                        float* out);

// sums[t - row] += Σ X[t, m] w_m for rows row … row + rows of the dense matrix.
void dense_run(const float* w, int64_t first, int64_t count, uint64_t key, Projection kind, int64_t row, int64_t rows,
               float* sums);

// out[m - first] (+)= Σ_t g_t X[t, m] over all rows.
void dense_adjoint_run(const float* g, int64_t rows, int64_t first, int64_t count, uint64_t key, Projection kind,
                       bool accumulate, float* out);

// Rows of the dense matrix that one task projects: several tasks share a short carrier, and every one tabulates it.
constexpr int64_t kDenseRows = 128;

inline int64_t chunks_of(int64_t count) { return (count + kChunk - 1) / kChunk; }

}  // namespace wmengine
