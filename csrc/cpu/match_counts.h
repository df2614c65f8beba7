// The class of each answer and how far every class of it stands out, with the expected ones counted by group.
#pragma once

#include <cstdint>

#include "half.h"

namespace wmengine {

constexpr int kMostLevel = 30;               // levels are -30 … 30
constexpr int kLevels = 2 * kMostLevel + 1;  // columns of a histogram

// What wmengine/ops/reference.py says of match_counts. scores[rows, classes] contiguous; `group` may be null, all rows
// are then of group 0, and so may levels[rows, classes] be, where nobody asks for them. Labels may be any integers,
// groups are 0 … groups - 1.
struct Matching {
    const void* scores;
    Stored stored;
    int64_t rows, classes;
    const int64_t* expected;
    const int64_t* group;
    int64_t groups;
};

struct Matches {
    int32_t* predicted;   // [rows]
    int8_t* at;           // [rows]
    uint32_t* histogram;  // [rows, kLevels]
    int32_t* hits;        // [groups]
    int32_t* invalid;     // [groups]
    int8_t* levels;       // [rows, classes] or null
};

void match_counts(const Matching& given, const Matches& found);

}  // namespace wmengine
