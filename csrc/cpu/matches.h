// Symbols compared all with all: how many of a suspect's are those of a watermark, for every pair of the two.
#pragma once

#include <cstdint>

namespace wmengine {

// counts[suspects, sets] of places where predicted[suspects, places] equals expected[sets, places], none negative:
// negative labels match nothing. Labels are at most `largest`, which is below 2^31 - 2.
template <typename Label>
void label_matches(const Label* predicted, int64_t suspects, const Label* expected, int64_t sets, int64_t places,
                   int64_t largest, int32_t* counts);

// Rows of `total` bits, packed as numpy.packbits(…, bitorder="little") does: bit t is bit t % 8 of byte t / 8. What the
// last byte holds beyond `total` must be zero.
struct PackedBits {
    const uint8_t* bytes;  // [rows, (total + 7) / 8] contiguous
    int64_t rows, total;
};

// counts[messages.rows, registry.rows] of equal bits.
void bit_matches(const PackedBits& messages, const PackedBits& registry, int32_t* counts);

// For each message the `best` registry rows with most equal bits, most first, ties to the lowest row: counts and
// indices [messages.rows, best]; 1 <= best <= registry.rows. Never holds counts of all pairs.
void best_bit_matches(const PackedBits& messages, const PackedBits& registry, int64_t best, int32_t* counts,
                      int64_t* indices);

}  // namespace wmengine
