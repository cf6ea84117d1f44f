#!/usr/bin/env python3
"""bench_core's JSON, and what `make bench-peers` says where there is no peer. Times are not judged.

usage: test_bench.py [BUILD_FOLDER]

Oracle for capacity: bytes of a conversation by hand, from the tile sizes that kvlite.h documents.
"""
import json
import os
import subprocess
import sys

BUILD = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("BUILD", "build")
BLOCK = 32  # tokens


def padded(n):
    return (n + 127) // 128 * 128


def f16_tile(dim):
    return padded(BLOCK * dim * 2)


def int4_tiles(dim):
    """K as INT4_CHANNEL (a scale and a zero for each channel), V as INT4 (both for each 64 numbers of a row)."""
    return padded(BLOCK * dim // 2 + 4 * dim) + padded(BLOCK * dim // 2 + BLOCK * dim // 64 * 4)


def conversation_bytes(layers, heads, dim, tokens, int4):
    blocks = -(-tokens // BLOCK)
    exact = blocks if not int4 else 1 + (tokens % BLOCK != 0)  # with int4 the first, and the open last one
    return layers * heads * (exact * 2 * f16_tile(dim) + (blocks - exact) * int4_tiles(dim))


def test_core():
    out = subprocess.run([os.path.join(BUILD, "bench_core"), "--json", "-"], stdout=subprocess.PIPE, check=True,
                         stderr=subprocess.PIPE, timeout=120).stdout
    got = json.loads(out)
    assert got["bench"] == "core" and got["simd"] in ("scalar", "avx2", "avx512")
    names = [r["what"] for r in got["rows"]]
    for name in ("plan, 256 decoding", "commit, 256 decoding", "block alloc + free", "prefix match",
                 "fork of 8,192 tokens", "seal int4_channel, 32 x 64", "seal nvfp4+rot, 32 x 128"):
        assert name in names, f"{name} is not in {names}"
    for r in got["rows"]:
        assert 0 < r["p50"] <= r["p99"], r
    shapes = {"SmolLM2-135M": (30, 3, 64), "Llama-3.1-8B": (32, 8, 128)}
    assert [(c["model"], c["tokens"]) for c in got["capacity"]] == [(m, t) for m in shapes for t in (1000, 4000)]
    for c in got["capacity"]:
        for preset in ("f16", "int4"):
            want = c["bytes"] / conversation_bytes(*shapes[c["model"]], c["tokens"], preset == "int4")
            assert 0.98 * want <= c[preset] <= want, f"{c['model']} {preset}: {c[preset]}, by hand {want:.1f}"


def test_no_peer():
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    p = subprocess.run(["make", "--no-print-directory", "bench-peers", "PEERS=/nonexistent"], env=env,
                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=60)
    assert p.returncode == 0, p.stderr
    assert p.stdout.startswith("SKIP") and "make peers" in p.stdout, f"it said: {p.stdout}"


def test_bad_options():
    for args, word in ((["--simd", "mmx"], "mmx"), (["--json"], "--json"), (["--fast"], "--fast")):
        p = subprocess.run([os.path.join(BUILD, "bench_core"), *args], stderr=subprocess.PIPE, text=True)
        assert p.returncode == 2 and word in p.stderr, f"{args}: {p.returncode}, {p.stderr}"


for test in (test_core, test_no_peer, test_bad_options):
    test()
    print(f"ok {test.__name__}")
