"""exp, log and log1p as programs of IEEE operations in one stated order: csrc/cpu/elementary.h, line by line.

Only add, subtract, multiply, divide, compare and integer steps are used, one rounding each, so every backend gives the
same bytes; a library's own ``exp`` promises no such thing. float32 and float64; other inputs are the caller's mistake.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any


class _Constants(NamedTuple):
    int_type: str
    mantissa_bits: int
    exponent_bias: int
    round_magic: float
    round_magic_bits: int
    sqrt_half_bits: int
    log2_e: float
    ln2_hi: float
    ln2_lo: float
    exp_min: float
    exp_max: float
    exp_poly: tuple[float, ...]
    atanh_poly: tuple[float, ...]


def _factorials_from_two(count: int) -> tuple[float, ...]:
    value, terms = 1, []
    for n in range(2, count + 2):
        value *= n
        terms.append(1.0 / value)
    return tuple(terms)


_CONSTANTS = {
    "float32": _Constants(
        "int32", 23, 127, 12582912.0, 0x4B400000, 0x3F3504F3,
        1.44269504, 0.693359375, -2.12194440e-4, -104.0, 89.0,
        (0.4999999403953552, 0.1666652113199234, 0.04166838899254799, 0.0083687175065279, 0.0013814596459269524),
        (0.3333333730697632, 0.19999438524246216, 0.14308442175388336, 0.10713828355073929, 0.12150469422340393),
    ),
    "float64": _Constants(
        "int64", 52, 1023, 6755399441055744.0, 0x4338000000000000, 0x3FE6A09E667F3BCD,
        1.4426950408889634, 6.93147180369123816490e-01, 1.90821492927058770002e-10, -746.0, 710.0,
        _factorials_from_two(12),
        tuple(1.0 / n for n in range(3, 34, 2)),
    ),
}  # fmt: skip


def _horner(coefficients: tuple[float, ...], x: Array) -> Array:
    p = x.dtype.type(coefficients[-1])
    for c in coefficients[-2::-1]:
        p = p * x + x.dtype.type(c)
    return p


def _exp2_int(n: Array, constants: _Constants, dtype: Any) -> Array:
    return ((n + constants.exponent_bias) << constants.mantissa_bits).view(dtype)


def exp(xp: Any, x: Array) -> Array:
    """e**x, same shape and type. Error 1.4 * 2**-24 relative in float32; NaN gives NaN, subnormals are kept."""
    c = _CONSTANTS[x.dtype.name]
    s = x.dtype.type
    x = xp.where(x < s(c.exp_min), s(c.exp_min), x)
    x = xp.where(x > s(c.exp_max), s(c.exp_max), x)
    shifted = x * s(c.log2_e) + s(c.round_magic)
    n = shifted - s(c.round_magic)
    r = (x - n * s(c.ln2_hi)) - n * s(c.ln2_lo)
    p = (_horner(c.exp_poly, r) * (r * r) + r) + s(1)
    whole = shifted.view(c.int_type) - c.round_magic_bits
    half = whole >> 1
    return (p * _exp2_int(half, c, x.dtype)) * _exp2_int(whole - half, c, x.dtype)


def _twice_atanh(s: Array) -> Array:
    c = _CONSTANTS[s.dtype.name]
    q = s * s
    twice = s + s
    return twice + twice * (q * _horner(c.atanh_poly, q))


def log1p_unit(u: Array) -> Array:
    """log(1 + u) for 0 <= u <= 1 with a small *relative* error, also for tiny u."""
    return _twice_atanh(u / (u + u.dtype.type(2)))


def log_normal(x: Array) -> Array:
    """log x for positive normal x (subnormal, zero and negative inputs give nonsense)."""
    c = _CONSTANTS[x.dtype.name]
    s = x.dtype.type
    bits = x.view(c.int_type)
    exponent = (bits - c.sqrt_half_bits) >> c.mantissa_bits
    m = (bits - (exponent << c.mantissa_bits)).view(x.dtype)
    e = (exponent + c.round_magic_bits).view(x.dtype) - s(c.round_magic)
    log_m = _twice_atanh((m - s(1)) / (m + s(1)))
    return e * s(c.ln2_hi) + (e * s(c.ln2_lo) + log_m)
