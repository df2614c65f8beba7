"""The engine's generator inside a Triton kernel: Philox4x32-10 and the normal values, as ``csrc/cpu`` states them.

Constants are spelled out where they are used: Triton reads no Python global that is not a constexpr.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

import triton
import triton.language as tl

DOMAIN_DENSE = tl.constexpr(1)
DOMAIN_SKETCH = tl.constexpr(2)
DOMAIN_RUN = tl.constexpr(3)
DOMAIN_SWAP = tl.constexpr(4)
DOMAIN_GAUSSIAN = tl.constexpr(5)


@triton.jit
def philox4x32(c0, c1, domain, key):
    """Four words uint32 of the counter (c0, c1, 0, domain): ``c0`` of any shape, ``c1`` fits it, ``key`` int64."""
    multiplier0 = tl.full((), 0xD2511F53, tl.uint32)
    multiplier1 = tl.full((), 0xCD9E8D57, tl.uint32)
    weyl0 = tl.full((), 0x9E3779B9, tl.uint32)
    weyl1 = tl.full((), 0xBB67AE85, tl.uint32)
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    c0 = c0.to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = c2 + tl.full((), domain, tl.uint32)
    c1 = (c2 + c1).to(tl.uint32)  # a loop counter may be a plain int in the interpreter
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, multiplier0)
        high1 = tl.umulhi(c2, multiplier1)
        low0 = c0 * multiplier0
        low1 = c2 * multiplier1
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = k0 + weyl0
        k1 = k1 + weyl1
    return c0, c1, c2, c3


@triton.jit
def flip(value, word, bit):
    """``value`` (float32) with its sign turned where bit ``bit`` of ``word`` is set."""
    sign = (word >> bit.to(tl.uint32)) << 31
    return (value.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def log_unit24(n):
    """ln(n·2⁻²⁴) of uint32 n in [1, 2²⁴]: by atanh series on [√½, √2), less than 2 ulp off."""
    bits = n.to(tl.float32).to(tl.uint32, bitcast=True) - 0x3F3504F3
    exponent = bits.to(tl.int32, bitcast=True) >> 23
    f = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    s = f / (2.0 + f)
    z = s * s
    series = z * (0.66666668 + z * (0.4 + z * (0.28571429 + z * (0.22222222 + z * 0.18181818))))
    k = (exponent - 24).to(tl.float32)
    return k * 0.693145752 + (k * 1.42860677e-06 + (2.0 * s + s * series))


@triton.jit
def cos_sin_turn24(n):
    """cos and sin of 2π·n·2⁻²⁴ for uint32 n < 2²⁴: octant in integers, then polynomials."""
    shifted = n + (1 << 21)
    quadrant = (shifted >> 22) & 3
    x = ((shifted & 0x3FFFFF).to(tl.int32) - (1 << 21)).to(tl.float32) * (1.57079633 / 4194304.0)
    z = x * x
    s = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    c = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    odd = (quadrant & 1) != 0
    a = tl.where(odd, s, c)
    b = tl.where(odd, c, s)
    return tl.where((quadrant == 1) | (quadrant == 2), -a, a), tl.where(quadrant >= 2, -b, b)


@triton.jit
def box_muller(word0, word1):
    """Two standard normal values from two words (Box and Muller 1958)."""
    radius = tl.sqrt(-2.0 * log_unit24((word0 >> 8) + 1))
    cosine, sine = cos_sin_turn24(word1 >> 8)
    return radius * cosine, radius * sine


@triton.jit
def normal_values(c0, c1, key):
    """The four normal values of the counters (c0, c1, 0, 5)."""
    w0, w1, w2, w3 = philox4x32(c0, c1, DOMAIN_GAUSSIAN, key)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return z0, z1, z2, z3
