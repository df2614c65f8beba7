// The soft nearest neighbour loss (Frosst, Papernot, Hinton 2019) without its matrix of distances: tiles of it are
// computed, used while they are in the cache, and forgotten; the gradient computes them again.
#pragma once

#include <cstdint>

namespace wmengine {

struct SoftNeighborProblem {
    const float* features;  // [rows, size], row stride in elements below
    int64_t rows, size, stride;
    const int64_t* labels;
    double temperature;
};

// What the gradient needs of each row i, of the others of its own label and then of those of other labels: the least
// squared distance m, and q / Σ_j exp(-(d_ij - m) / T), where q is the row's share: exp(-loss_i) = 1 - q. Both are 0
// where there is no such other row, and the weights are 0 in a row without another of its label.
struct SoftNeighborRows {
    float* same_nearest;
    float* same_weight;
    float* other_nearest;
    float* other_weight;
};

// The mean over the rows that have another of their label; 0 where there is none; NaN where a feature is not finite or
// a squared norm is beyond float32.
double soft_nearest_neighbor(const SoftNeighborProblem& problem, const SoftNeighborRows& result);

// factor · dloss/dfeatures into gradient[rows, size] (null: not wanted); returns factor · dloss/dtemperature.
double soft_nearest_neighbor_backward(const SoftNeighborProblem& problem, const SoftNeighborRows& rows, double factor,
                                      float* gradient);

}  // namespace wmengine
