#!/usr/bin/env python3
"""The benchmarks against llama.cpp run, and both sides compute the same thing. Times are not judged. Needs `make peers`.

usage: test_peers.py [BUILD_FOLDER [MODEL.gguf]]

Each program checks itself that the results agree (attention: with double precision; the model: by the first tokens);
here the error of every format is bounded, and llama.cpp's caches are in the order of their bits.
"""
import json
import os
import subprocess
import sys

BUILD = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("BUILD", "build")
MODEL = sys.argv[2] if len(sys.argv) > 2 else "build/models/SmolLM2-135M-Instruct.Q4_1.gguf"
PROGRAMS = ["bench_peer_attention", "bench_peer_llm", "bench_peer_quality"]

if not os.path.exists("build/peers/.made"):
    print("SKIP: llama.cpp is not there (make peers)")
    sys.exit(77)


def run(program, *args):
    out = subprocess.run([os.path.join(BUILD, program), *args, "--json", "-"], stdout=subprocess.PIPE, check=True,
                         timeout=250).stdout
    return json.loads(out)


def test_attention():
    # largest error by the bits of the coarser side; fp8 has 3 of mantissa, ggml sums F16 values in F16
    most = {"f32": 1e-5, "f16": 0.02, "bf16": 0.01, "int8": 0.02, "int8+": 0.02, "fp8": 0.08, "q8_0": 0.02}
    for what, n in (("decode", 15), ("prefill", 7)):
        got = run("bench_peer_attention", "--only", what, "--d", "64", "--gqa", "4", "--context", "1024", "--rounds",
                  "1")
        assert len(got["rows"]) == n, f"{what}: {[r['kv'] for r in got['rows']]}"
        for r in got["rows"]:
            name = r["kv"].split()[1]
            assert 0 <= r["error"] < most.get(name, 0.25), f"{what} {r['kv']}: error {r['error']}"
            assert r["what"] == what and r["us"] > 0
            if r["kv"].startswith("kvlite"):
                assert r["ratio"] > 0 and r["peer"].startswith("ggml")
            if what == "decode":  # ggml pads its own layout to 256 tokens
                bits = r["bytes"] * 8 / (1008 * 8 * 64 * 2)
                want = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q4_0": 4.5}.get(name)
                assert want is None or want <= bits < want * 1.03, f"{r['kv']}: {bits} bits"


def test_quality():
    got = {r["kv"]: r for r in run("bench_peer_quality", "-m", MODEL, "-f", "README.md", "--ctx", "128", "--chunks", "1")}
    f32, f16, q8, q4 = (got[f"llama.cpp {t}"] for t in ("f32", "f16", "q8_0", "q4_0"))
    assert f32["kld_mean"] == 0 and f32["top1_percent"] == 100 and f32["dppl_percent"] == 0
    assert 0 < f16["kld_mean"] < 0.05 and q8["kld_mean"] < 0.05 < 1 > q4["kld_mean"] > 2 * q8["kld_mean"]
    assert [r["bits"] for r in (f32, f16, q8, q4)] == [32, 16, 8.5, 4.5]
    for r in got.values():
        assert 1 < r["ppl"] < 1000 and r["kld_p99"] <= r["kld_p999"]


def test_bad_options():
    for program in PROGRAMS:
        p = subprocess.run([os.path.join(BUILD, program), "--nonsense"], stderr=subprocess.PIPE, text=True)
        assert p.returncode == 2 and "--nonsense" in p.stderr, f"{program}: {p.returncode}, {p.stderr}"
    p = subprocess.run([os.path.join(BUILD, "bench_peer_llm"), "-m", MODEL, "-f", "/nonexistent"],
                       stderr=subprocess.PIPE, text=True)
    assert p.returncode == 1 and "/nonexistent" in p.stderr, p.stderr


env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
subprocess.run(["make", "--no-print-directory", *(os.path.join(BUILD, p) for p in PROGRAMS)], check=True, env=env)
for test in (test_attention, test_quality, test_bad_options):
    test()
    print(f"ok {test.__name__}")
