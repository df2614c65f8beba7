// Cross entropy of task rows and trigger rows in one pass, with its gradient while each row is in the cache.
#pragma once

#include <cstdint>

#include "half.h"

namespace wmengine {

struct CrossEntropyProblem {
    const void* logits;  // [rows, classes], row stride in elements below
    Stored stored;
    int64_t rows, classes, stride;
    const int64_t* labels;
    const float* weight;   // [rows] or null: 1
    const int64_t* group;  // [rows] or null: 0
    int64_t groups;
    double label_smoothing;
    int64_t ignore_index;
};

struct CrossEntropyResult {
    float* loss;
    float* group_loss;    // [groups]
    int64_t* group_hits;  // [groups]
    float* normalizers;   // [rows, 2]: top and Σ exp(z − top), what the gradient needs of each row; or null
    float* denominator;   // Σ weight of the rows that count for a mean, 1 for a sum
    void* gradient;       // [rows, classes] of the logits' type, or null
};

// -1, or the first row whose label or group is out of range (nothing else is computed then).
int64_t first_bad_row(const CrossEntropyProblem& problem);

void marked_cross_entropy(const CrossEntropyProblem& problem, bool mean, const CrossEntropyResult& result);

// gradient = factor · weight · (softmax − target), 0 in ignored rows, from the normalizers of each row.
void marked_cross_entropy_backward(const CrossEntropyProblem& problem, double factor, const float* normalizers,
                                   void* gradient);

}  // namespace wmengine
