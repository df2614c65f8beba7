// exp for vectors of any width.
#pragma once

#include "simd.h"

namespace wmengine {

// exp(x) for x <= 0, 0 where it is below 2^-127, NaN for NaN; within 3 units in the last place down to -32, 5 below.
// What comes of x > 0 has no meaning. x = n ln 2 + r, |r| <= ln 2 / 2; exp(r) by a minimax polynomial, relative error
// 9.2e-8; 2^n from its exponent bits.
template <Level level, int lanes>
struct Exponential {
    typedef Floats<lanes> V;
    V least;

    WM_INLINE Exponential make() {
        // GCC takes a maximum with a number that it knows for a comparison and a choice, so it is kept from knowing.
        float number = -88.02f;
        asm("" : "+m"(number));
        return {spread<lanes>(number)};
    }

    __attribute__((always_inline)) V operator()(V x) const {
        // Adding 1.5 · 2^23 rounds to an integer in the low bits, adding 127 makes that the biased exponent of 2^n: for
        // the least x it is 0, and so is 2^n. The order of the arguments of `maximum` lets a NaN through.
        const V shifter = spread<lanes>(12582912.0f + 127.0f);
        const V clamped = maximum(least, x);
        const V rounded = clamped * spread<lanes>(1.44269504f) + shifter;
        const V n = rounded - shifter;
        V r;
        if constexpr (level == Level::kBaseline) {  // perhaps no fused multiply: ln 2 in two parts, one product exact
            r = (clamped - n * spread<lanes>(0.693145752f)) - n * spread<lanes>(1.42860677e-06f);
        } else {  // the constant's own error costs two units at -87, where a second step would cost a tenth of the time
            r = clamped - n * spread<lanes>(0.693147181f);
        }
        V p = spread<lanes>(0.00829027227f);
        p = p * r + spread<lanes>(0.0418981596f);
        p = p * r + spread<lanes>(0.166676381f);
        p = p * r + spread<lanes>(0.499991478f);
        p = p * r + spread<lanes>(0.999999706f);
        p = p * r + spread<lanes>(1.0f);
        return p * (V)((Words32<lanes>)rounded << 23);
    }
};

}  // namespace wmengine
