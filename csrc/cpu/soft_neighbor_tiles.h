// A tile of squared distances, and what the soft nearest neighbour loss and its gradient take from it.
#pragma once

#include <cstdint>

#include "soft_neighbor_products.h"

namespace wmengine::soft_neighbor {

constexpr float kSpan = 80;  // exp(-80) is far from the least normal float

struct Tile {
    alignas(64) float d[kBlock * kBlock];  // x_i·x_j, then distances, then weights
    float least, largest;                  // over the pairs that count
    int64_t near;                          // pairs computed from the difference of their features: places in d
    uint16_t near_at[kBlock * kBlock];

    bool narrow(const View& v) const { return (largest - least) * v.inverse_temperature <= kSpan; }
};

// What a tile adds to the two sums of its rows: the sum of exp(-(d - nearest) / T) over the pairs of one kind.
struct Parts {
    float* at;  // [blocks][4][padded_rows]: same_nearest, same_sum, other_nearest, other_sum, by the other block
    int64_t padded_rows;

    float* row(int64_t other, int kind, int64_t block) const {
        return at + (other * 4 + kind) * padded_rows + block * kBlock;
    }
};

struct GradientSums {
    float* weighted;   // Σ_j W_ij x_j, packed as View::down; null: not wanted
    double* weight;    // [padded_rows] Σ_j W_ij
    double* distance;  // [blocks][blocks] Σ W_ij d_ij of a tile
};

// Both find the tile's distances from the products in it. The first writes the parts of its rows and columns.
void sum_tile(const View& v, const Parts& parts, int64_t I, int64_t J, Tile& tile);

// Turns distances into weights W, whose sums are added; where `weighted` is wanted, near pairs are added to it and
// leave the tile, which the caller multiplies by the features.
void gradient_tile(const View& v, const SoftNeighborRows& rows, const GradientSums& sums, int64_t I, int64_t J,
                   Tile& tile);

}  // namespace wmengine::soft_neighbor
