#pragma once

#include <cstdint>
#include <cstring>

struct __half {
    uint16_t bits;
};

inline float __half2float(__half half) {
    const bool negative = half.bits & 0x8000;
    const int exponent = half.bits >> 10 & 31, fraction = half.bits & 1023;
    // A float has 112 more exponents below; the largest one stands for infinity and NaN in both.
    uint32_t bits = static_cast<uint32_t>(fraction) << 13;
    float value;
    if (exponent == 0) {
        value = static_cast<float>(fraction) / 16777216.0f;
        return negative ? -value : value;
    }
    bits |= static_cast<uint32_t>(exponent == 31 ? 255 : exponent + 112) << 23;
    bits |= negative ? 0x80000000u : 0u;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
