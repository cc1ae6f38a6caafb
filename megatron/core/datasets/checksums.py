"""CRC-32 of a whole from the CRC-32 of its parts: files are checked by several threads, and joined without reading."""

from __future__ import annotations

from functools import lru_cache

# A checksum is a polynomial over GF(2) modulo this one; bit 31 is the coefficient of x^0, as everywhere in zlib.
_MODULUS = 0xEDB88320
_ONE = 0x80000000
_X_TO_THE_8 = _ONE >> 8


def combined_crc32(first: int, second: int, second_bytes: int) -> int:
    """`zlib.crc32` of two texts end to end, from the checksums of both and the length of the second."""
    return _product(_shift(second_bytes), first) ^ second


def _product(a: int, b: int) -> int:
    result = 0
    while a:
        if a & _ONE:
            result ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (_MODULUS if b & 1 else 0)
    return result


@lru_cache(maxsize=64)
def _shift(num_bytes: int) -> int:
    """x to the power of `8 * num_bytes`: what so many bytes behind a text multiply its checksum with."""
    result, factor = _ONE, _X_TO_THE_8
    while num_bytes:
        if num_bytes & 1:
            result = _product(result, factor)
        factor = _product(factor, factor)
        num_bytes >>= 1
    return result
