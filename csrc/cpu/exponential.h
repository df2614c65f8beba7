// exp for vectors of any width.
#pragma once

#include "simd.h"

namespace wmengine {

// exp(x) for x <= 88, 0 below -87.3 (where floats would turn subnormal); within 2 ulp; x must be a number.
// x = n ln 2 + r, |r| <= ln 2 / 2; exp(r) by a degree-6 polynomial; 2^n by adding n to the exponent bits.
template <int lanes>
WM_INLINE Floats<lanes> exponential_of_number(Floats<lanes> x) {
    using V = Floats<lanes>;
    const V shifter = spread<lanes>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const V least = spread<lanes>(-87.3f);
    const V rounded = maximum(x, least) * 1.44269504f + shifter;
    const V n = rounded - shifter;
    const V r = (maximum(x, least) - n * 0.693145752f) - n * 1.42860677e-06f;
    V p = r * 1.3888889e-3f + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const V scaled = (V)((Words32<lanes>)p + ((Words32<lanes>)rounded << 23));
    return x < least ? V{} : scaled;
}

}  // namespace wmengine
