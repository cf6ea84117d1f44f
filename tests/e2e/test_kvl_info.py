#!/usr/bin/env python3
"""build/kvl_info: what it lists here, on machines without a Vulkan loader or driver, on lavapipe; bad options.

usage: test_kvl_info.py [BUILD_FOLDER]

Oracles: the rules of formats and head dims as the README has them; the report's own words.
"""
import json
import os
import subprocess
import sys
import tempfile

from cases import Skip, lavapipe, run_functions

BUILD = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("BUILD", "build")
SCRATCH = tempfile.TemporaryDirectory()
PRESETS = ["f32", "f16", "bf16", "int8", "int8+", "fp8", "nvfp4", "balanced", "int4"]
BY_CHANNEL = ["int8+", "int4"]  # these need blocks of 32


def run(*args, code=0, **env):
    p = subprocess.run([os.path.join(BUILD, "kvl_info"), *args], capture_output=True, timeout=300, env={**os.environ, **env})
    out, err = p.stdout.decode(), p.stderr.decode()
    assert p.returncode == code, f"{args}: exit code {p.returncode}, not {code}: {err}"
    return out, err


def devices(*args, code=0, **env):
    return json.loads(run("--json", *args, code=code, **env)[0])["devices"]


def no_library(*names):
    """A folder where those libraries are, and are none."""
    folder = tempfile.mkdtemp(dir=SCRATCH.name)
    for name in names:
        open(os.path.join(folder, name), "wb").close()
    return folder


def test_help():
    out, err = run("-h")
    assert out.startswith("usage: kvl_info") and "--json" in out and not err, (out, err)


def test_bad_options():
    for args, word in [(["--nonsense"], "--nonsense"), (["extra"], "extra"), (["--backend", "metal"], "metal"),
                       (["--backend"], "--backend"), (["--device", "x"], "--device"), (["--test", "int9"], "int9"),
                       (["--dim", "1000"], "--dim"), (["--json=1"], "--json")]:
        out, err = run(*args, code=2)
        assert not out and err.startswith("kvl_info: ") and word in err, (args, out, err)


def test_cpu_supports_all():
    cpu, = devices("--backend", "cpu")
    assert cpu["usable"] and cpu["name"].startswith("cpu (") and "memory" not in cpu, cpu
    assert [p["name"] for p in cpu["presets"]] == PRESETS
    for p in cpu["presets"]:
        assert p["head_dims"] == list(range(16, 257, 16)), p
        assert p["block_tokens"] == ([32, 64] if p["name"] in BY_CHANNEL else [8, 16, 32, 64]), p


def test_every_backend_is_listed():
    everything = json.loads(run("--json")[0])
    assert {d["backend"] for d in everything["devices"]} == {"cuda", "vulkan", "cpu", "null"}
    for d in everything["devices"]:
        assert d["usable"] or d["reason"], d
    text = run()[0]
    for d in everything["devices"]:
        assert (d["name"] if d["usable"] else d["reason"]) in text, d
    assert everything["automatic"]["name"] in text


def test_without_a_loader():
    path = no_library("libvulkan.so.1", "libvulkan.so", "libcuda.so.1", "libcuda.so")
    for backend, word, advice in [("vulkan", "libvulkan is not there", "libvulkan1"), ("cuda", "libcuda is not there", "driver")]:
        d, = devices("--backend", backend, LD_LIBRARY_PATH=path)
        assert not d["usable"] and word in d["reason"] and advice in d["advice"], d
        assert "device" not in d, d
        text = run("--backend", backend, LD_LIBRARY_PATH=path)[0]
        assert word in text and "what to do: " in text, text
    report = json.loads(run("--json", LD_LIBRARY_PATH=path)[0])["automatic"]
    assert report["name"].startswith("cpu"), report
    assert [line.split(":")[0] for line in report["report"]] == ["cuda", "vulkan", "cpu"], report


def test_without_a_driver():
    lavapipe(BUILD)  # the loader is there
    d, = devices("--backend", "vulkan", VK_ICD_FILENAMES="/nowhere.json", VK_DRIVER_FILES="/nowhere.json")
    assert not d["usable"] and "driver" in d["reason"] and "VK_DRIVER_FILES" in d["advice"], d


def test_lavapipe():
    d, = devices("--backend", "vulkan", **lavapipe(BUILD))
    assert d["usable"] and d["device"] == 0 and "llvmpipe" in d["name"], d
    assert d["tests"] == [], "a CPU's shaders take seconds: they are compiled when asked for"
    m = d["memory"]
    assert 0 < m["available"] <= m["budget"] <= m["total"] and m["unified"], m
    for p in d["presets"]:
        assert p["head_dims"] == list(range(64, 257, 16)), p
        assert p["block_tokens"] == ([32, 64] if p["name"] in BY_CHANNEL else [16, 32, 64]), p
    assert any("fp16+storage16+subgroup" in line for line in d["report"]), d
    automatic = json.loads(run("--json", **lavapipe(BUILD))[0])["automatic"]
    assert any("vulkan: skipped: " in line and "is a CPU" in line for line in automatic["report"]), automatic


def test_lavapipe_compiles_and_tests():
    d, = devices("--backend", "vulkan", "--test", "f16", "--dim", "64", **lavapipe(BUILD))
    test, = d["tests"]
    assert test["works"] and test["preset"] == "f16" and test["head_dim"] == 64, test
    line = [s for s in d["report"] if s.startswith("vulkan: f16, head dim 64: ")]
    assert len(line) == 1 and all(s in line[0] for s in ("store ", "decode ", "prefill ", "merge ")), d["report"]
    assert not [s for s in d["report"] if "wrong on this driver" in s], d["report"]
    d, = devices("--backend", "vulkan", "--test", "f16", "--dim", "48", code=1, **lavapipe(BUILD))
    assert not d["tests"][0]["works"] and "below 64" in d["tests"][0]["reason"], d["tests"]


def test_a_device_that_is_not_there():
    out, err = run("--backend", "vulkan", "--device", "9", code=1, **lavapipe(BUILD))
    assert "no device 9" in err, (out, err)
    assert [d["device"] for d in devices("--backend", "vulkan", "--device", "0", **lavapipe(BUILD))] == [0]


if __name__ == "__main__":
    sys.exit(run_functions(globals()))
