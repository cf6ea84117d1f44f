#!/usr/bin/env python3
"""Writes tests/golden/tiles.inc: what the encoders of kvlite.h must give, byte for byte. Independent of the
header: numpy floats, and the nearest code found by comparing distances in float64, where they are exact.
Usage: gen_golden.py [output]"""
import sys
from pathlib import Path
import numpy as np

F32, F64, U32 = np.float32, np.float64, np.uint32
EXACT = ("f32", "f16", "bf16")
CHANNEL = {"int8_channel": 255, "int4_channel": 15}
ROTATED = ("int8", "fp8_e4m3", "nvfp4", "int4")
FORMATS = EXACT + ROTATED + tuple(CHANNEL) + tuple(f + "+rot" for f in ROTATED)
DIMS = (16, 64, 80, 96, 112, 128, 256)
TOKENS = (8, 32, 64)
PATTERNS = ("bell", "outliers", "spread", "ties", "single", "huge", "constant")
GLOBALS = (0.0625, 0.05)  # of NVFP4; the second is no power of two
E2M1 = np.array([0, .5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array([(m * 2.0**-9) if m < 8 else (8 + m % 8) / 8 * 2.0**(m // 8 - 7) for m in range(127)])  # up to 448


# ---- inputs: integers, so that the test makes the same ones
def mix(i):
    """murmur3's finaliser."""
    h = (i & 0xffffffff).astype(np.uint64)
    h ^= h >> 16
    h = h * 0x85ebca6b & 0xffffffff
    h ^= h >> 13
    h = h * 0xc2b2ae35 & 0xffffffff
    return (h ^ h >> 16).astype(np.int64)


def bytes_sum(h):
    return (h & 255) + (h >> 8 & 255) + (h >> 16 & 255) + (h >> 24) - 510


def rows_of(pattern, base, tokens, dim):
    t, e = np.mgrid[0:tokens, 0:dim]
    h = mix((t * dim + e + 977 * dim + 31 * tokens + 7777 * PATTERNS.index(pattern)).astype(np.uint64))
    n = bytes_sum(h)
    if pattern == "bell":
        return (n / 256).astype(F32)
    if pattern == "outliers":  # large channels, and channels with a large bias
        return np.where(e % 16 == 3, n / 16, np.where(e % 16 == 7, (n + 1536) / 64, n / 256)).astype(F32)
    if pattern == "spread":  # subnormal f16 to thousands; rows of zeros of both signs
        x = n * 2.0**(t * 5 % 30 - 24)
        return np.where(t % 5 == 4, np.where(h & 1, -0.0, 0.0), x).astype(F32)
    if pattern == "ties":
        if base in CHANNEL or base == "int4":
            top = CHANNEL.get(base, 15)
            x, i = h % (2 * top + 1) / 2, t if base in CHANNEL else e % 16
            return np.where(i == 0, 0, np.where(i == 1, top, x)).astype(F32)
        if base == "nvfp4":
            return np.where(e % 16 == 0, 6, (h % 49 - 24) / 4).astype(F32)
        if base == "fp8_e4m3":
            m = h % 126
            return np.where(e == 0, 448, (E4M3[m] + E4M3[m + 1]) / 2 * np.where(h >> 20 & 1, -1, 1)).astype(F32)
        return np.where(e == 0, 127, (h % 509 - 254) / 2).astype(F32)
    if pattern == "single":  # all 24 bits of an f32
        x = ((h >> 8) | 1) * 2.0**((mix(h.astype(np.uint64)) & 15) - 32)
        return np.where(h & 1, -x, x).astype(F32)
    if pattern == "huge":
        return (n * 128.0).astype(F32)
    return (((t * 37 + 11) % 101 - 50) / 8 + 0 * e).astype(F32)


# ---- numbers
def to_f16(x):
    return np.clip(x, F32(-65504), F32(65504)).astype(np.float16)


def scale_f16(x):
    h = to_f16(x)
    return np.where(h == 0, np.float16(1), h).astype(np.float16)


def to_bf16_bits(x):
    b = x.view(U32).astype(np.uint64)
    low, high = b & 0xffff, b >> 16
    return (high + ((low > 0x8000) | ((low == 0x8000) & (high & 1 == 1)))).astype(np.uint16)


def nearest(a, values, s):
    """Index of the value whose product with s is nearest to a >= 0; of two at the same distance the even one."""
    d = np.abs(a.astype(F64)[..., None] - values * s.astype(F64)[..., None])
    least = d == d.min(-1, keepdims=True)
    first = least.argmax(-1)
    second = values.shape[0] - 1 - least[..., ::-1].argmax(-1)
    return np.where(first % 2 == 0, first, second)


def nearest_integer(x, s, lo, hi):
    x, s = x.astype(F64), s.astype(F64)
    below = np.floor(x / s) - 1
    best, distance = below, np.abs(x - below * s)
    for k in (below + 1, below + 2, below + 3):
        d = np.abs(x - k * s)
        take = (d < distance) | ((d == distance) & (k % 2 == 0))
        best, distance = np.where(take, k, best), np.where(take, d, distance)
    return np.clip(best, lo, hi).astype(np.int64)


def to_e4m3(x):
    return nearest(np.minimum(x, F32(448)), E4M3, np.ones_like(x)).astype(np.uint8)


def hadamard(x):
    n = 1
    while n < 128 and x.shape[-1] % (2 * n) == 0:
        n *= 2
    y = x.reshape(-1, n).copy()
    stride = 1
    while stride < n:
        z = y.reshape(-1, n // (2 * stride), 2, stride)
        y = np.stack([z[:, :, 0] + z[:, :, 1], z[:, :, 0] - z[:, :, 1]], 2).reshape(-1, n)
        stride *= 2
    return (y * F32(1 / np.sqrt(F64(n)))).reshape(x.shape)


def nibbles(codes):
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)


# ---- tiles
def symmetric(x, inverse, encode):
    s = scale_f16(np.abs(x).max(-1) * inverse)
    return encode(x, s.astype(F32)[:, None]).astype(np.uint8).tobytes() + s.tobytes()


def fp8(x, s):
    return nearest(np.abs(x), E4M3, np.broadcast_to(s, x.shape)) | np.where(np.signbit(x), 128, 0)


def min_max(x, axis, top):
    lo, hi = x.min(axis, keepdims=True) + F32(0), x.max(axis, keepdims=True)
    z, s = to_f16(lo), scale_f16((hi - lo) * F32(1 / top))
    return nearest_integer(x - z.astype(F32), s.astype(F32), 0, top), s, z


def int4(x):
    dim, codes, scales = x.shape[1], [], []
    for g in range(0, dim, 64):
        c, s, z = min_max(x[:, g:g + 64], 1, 15)
        codes.append(c)
        scales += [s, z]
    return nibbles(np.concatenate(codes, 1)).tobytes() + np.concatenate(scales, 1).tobytes()


def channel(x, top):
    codes, s, z = min_max(x, 0, top)
    return (codes.astype(np.uint8) if top == 255 else nibbles(codes)).tobytes() + s.tobytes() + z.tobytes()


def nvfp4(x, tensor_scale):
    tensor_scale = F32(tensor_scale)
    y = x.reshape(-1, 16)
    amax = np.abs(y).max(-1)
    best = None
    for peak in (6, 4):
        b = np.maximum(to_e4m3(amax * F32(1 / peak) * (F32(1) / tensor_scale)), 1)
        s = E4M3[b].astype(F32) * tensor_scale
        limits = ((E2M1[1:] + E2M1[:-1]) / 2).astype(F32) * s[:, None]
        a = np.abs(y)
        codes = np.zeros(y.shape, np.int64)
        for m in range(7):
            limit = limits[:, m:m + 1]
            codes += (a > limit) | ((a == limit) & (m % 2 == 1))
        d = a - E2M1[codes].astype(F32) * s[:, None]
        error = np.zeros(len(y), F32)
        for e in range(16):
            error = error + d[:, e] * d[:, e]
        if best is None:
            best = [error, b, codes]
        else:
            take = error < best[0]
            best = [error, np.where(take, b, best[1]), np.where(take[:, None], codes, best[2])]
    codes = best[2] | np.where(np.signbit(y), 8, 0)
    return nibbles(codes).tobytes() + best[1].astype(np.uint8).tobytes()


def tile(name, x, tensor_scale):
    base = name.removesuffix("+rot")
    if base != name:
        x = hadamard(x)
    with np.errstate(over="ignore"):
        out = (x.tobytes() if base == "f32" else x.astype(np.float16).tobytes() if base == "f16" else to_bf16_bits(x).tobytes()
               if base == "bf16" else symmetric(x, F32(1 / 127), lambda x, s: nearest_integer(x, s, -127, 127)) if base == "int8" else
               symmetric(x, F32(1 / 448), fp8) if base == "fp8_e4m3" else nvfp4(x, tensor_scale) if base == "nvfp4" else
               int4(x) if base == "int4" else channel(x, CHANNEL[base]))
    return out + bytes(-len(out) % 128)


def fnv(data):
    h = 0xcbf29ce484222325
    for b in data:
        h = (h ^ b) * 0x100000001b3 & 0xffffffffffffffff
    return h


def main():
    out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "tests/golden/tiles.inc")
    lines = ["/* Made by tools/gen_golden.py: format, pattern of the input, tokens, dim, NVFP4 global, bytes, FNV-1a of the tile. */"]
    for name in FORMATS:
        base = name.removesuffix("+rot")
        for p, pattern in enumerate(PATTERNS):
            for tokens in TOKENS:
                for dim in DIMS:
                    if base in CHANNEL and tokens < 32 or (base == "f32" and pattern != "single"):
                        continue
                    for g in GLOBALS if base == "nvfp4" else (0,):
                        data = tile(name, rows_of(pattern, base, tokens, dim), g)
                        lines.append(f'HASH("{name}", {p}, {tokens}, {dim}, {g}f, {len(data)}, 0x{fnv(data):016x}u)'.replace(" 0f", " 0.0f"))
    lines.append("/* Whole tiles: format, tokens, dim, bytes as hex (pattern 1, padding left out). */")
    for name in FORMATS:
        tokens = 32 if name in CHANNEL else 8
        data = tile(name, rows_of("outliers", name.removesuffix("+rot"), tokens, 16), GLOBALS[0]).rstrip(b"\0")
        text = data.hex()
        lines.append(f'TILE("{name}", {tokens}, 16,')
        lines += [f'     "{text[i:i + 100]}"' for i in range(0, len(text), 100)]
        lines[-1] += ")"
    out.write_text("\n".join(lines) + "\n")


main()
