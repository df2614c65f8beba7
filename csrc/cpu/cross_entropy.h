// Cross entropy of task rows and trigger rows in one pass, with its gradient while each row is in the cache.
#pragma once

#include <cstdint>

namespace wmengine {

struct CrossEntropyProblem {
    const float* logits;  // [rows, classes], row stride in elements below
    int64_t rows, classes, stride;
    const int64_t* labels;
    const float* weight;   // [rows] or null: 1
    const int64_t* group;  // [rows] or null: 0
    int64_t groups;
    double label_smoothing;
    int64_t ignore_index;
    bool mean;
};

struct CrossEntropyResult {
    double* loss;
    float* group_loss;    // [groups]
    int64_t* group_hits;  // [groups]
    float* gradient;      // [rows, classes] contiguous, or null; may be the logits themselves
    float* row_loss;      // [rows] workspace
    uint8_t* row_hit;     // [rows] workspace
};

// -1, or the first row whose label or group is out of range (nothing else is computed then).
int64_t first_bad_row(const CrossEntropyProblem& problem);

void marked_cross_entropy(const CrossEntropyProblem& problem, const CrossEntropyResult& result);

}  // namespace wmengine
