// Carrier → projection → link loss over many layers in one call, and its gradient; also the bare projections.
#pragma once

#include <cstdint>
#include <vector>

#include "projection.h"

namespace wmengine {

enum class Carrier : int { kFlat = 0, kUnitFilters = 1, kFilterMean = 2, kUnitFilterMean = 3 };
enum class Link : int { kBce = 0, kHinge = 1, kMse = 2, kStdm = 3 };

// One weight W[filters, size] and the key of its signs; `gradient` is written by embedding_backward. A filter holds its
// values in order, or for unit filters with channels last: value c·(size/channels) + k at k·channels + c; its gradient
// does likewise. channels is 1 for the first.
struct Weight {
    const float* values;
    float* gradient;
    int64_t filters, size, channels;
    uint64_t key;
};

// y[t] = scale * Σ over weights of P(key) v, for t < total. inverse_norms (Σ filters floats, or null where the carrier
// has no unit filters) receives 1/‖row‖, 0 for a zero row, times the row's sign where `signs` is not null.
void carrier_projection(const std::vector<Weight>& weights, Carrier carrier, Projection projection, int64_t total,
                        double scale, const float* signs, float* inverse_norms, float* y);

// Σ_t link(y_t, bit_t), and its derivative by y.
double link_loss(const float* y, const uint8_t* bits, int64_t total, Link link, double margin, float* residual);

// gradient = factor * dloss/dW for each weight, from the residual of the forward call.
void embedding_backward(const std::vector<Weight>& weights, Carrier carrier, Projection projection, int64_t total,
                        double factor, const float* inverse_norms, const float* residual);

// out[m] (+)= factor * Σ_t X[t, m] g[t].
void projection_adjoint(const float* g, int64_t total, int64_t count, uint64_t key, Projection projection,
                        double factor, bool accumulate, float* out);

}  // namespace wmengine
