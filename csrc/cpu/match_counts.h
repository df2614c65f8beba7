// argmax of answers, compared with K label sets and counted, in one read of the answers.
#pragma once

#include <cstdint>

#include "half.h"

namespace wmengine {

// outputs[suspects, queries, classes] contiguous; expected[sets, queries]; counts[suspects, sets]; invalid[suspects].
// A row that holds NaN or Inf never matches and is counted as invalid; ties go to the lowest class.
void match_counts(const void* outputs, Stored stored, int64_t suspects, int64_t queries, int64_t classes,
                  const int64_t* expected, int64_t sets, int32_t* counts, int32_t* invalid);

}  // namespace wmengine
