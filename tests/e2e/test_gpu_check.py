#!/usr/bin/env python3
"""tools/gpu_check.sh from end to end with the mock driver, and what the report makes of its results. Figures are not judged.

usage: test_gpu_check.py [BUILD_FOLDER]
"""
import importlib.util
import json
import os
import subprocess
import sys
import tempfile

from cases import Skip, run_functions

BUILD = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("BUILD", "build")
PRESETS = {"f16", "bf16", "int8", "int8+", "fp8", "balanced", "int4", "nvfp4"}
ENV = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}


def bench(*args, program="bench_cuda", **env):
    return subprocess.run([os.path.join(BUILD, program), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          timeout=60, env=dict(ENV, **env), check=False)


def report(name):
    sys.path.insert(0, "tools/report")
    spec = importlib.util.spec_from_file_location(name, f"tools/report/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_driver():
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "libcuda.so.1"), "w", encoding="ascii") as f:
            f.write("no library")
        done = bench(LD_LIBRARY_PATH=folder)
        assert done.returncode == 77 and done.stdout.startswith("SKIP") and "libcuda" in done.stdout, done
        done = bench(program="bench_vulkan", VK_ICD_FILENAMES="/nonexistent", VK_DRIVER_FILES="/nonexistent")
        assert done.returncode == 77 and done.stdout.startswith("SKIP") and "driver" in done.stdout, done


def test_bad_options():
    for args, word in ((["--fast"], "--fast"), (["--json"], "--json"), (["--seconds", "0"], "--seconds")):
        done = bench(*args)
        assert done.returncode == 2 and word in done.stderr, done
    for args, word in ((["--fast"], "--fast"), (["--device", "x"], "--device"), (["--without", "fp32"], "fp32")):
        done = bench(*args, program="bench_vulkan")
        assert done.returncode == 2 and word in done.stderr, done
    done = subprocess.run(["tools/gpu_check.sh", "--fast"], stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "--fast" in done.stderr, done


def test_cases():
    lines = [line.split() for line in bench("--list").stdout.splitlines()]
    assert {line[1] for line in lines} == PRESETS and {line[0] for line in lines} == {"decode", "prefill"}, lines[:9]
    decode = [[int(x) for x in line[2:]] for line in lines if line[0] == "decode"]
    batches, contexts = {d[0] for d in decode}, {d[1] for d in decode}
    assert min(batches) == 1 and max(batches) == 256 and {d[2] for d in decode} == {4, 8}, decode[:9]
    assert min(contexts) < 1024 and 131040 < max(contexts) < 131072, contexts
    assert all(d[3] == 1 for d in decode)


def test_all_of_it_with_the_mock():
    if BUILD != "build":
        raise Skip("gpu_check.sh builds into build/")
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "gpu_check.json")
        done = subprocess.run(["tools/gpu_check.sh", "--mock", "--out", out], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, timeout=600, env=ENV, check=False)
        assert done.returncode == 0, done.stdout
        with open(out, encoding="utf-8") as f:
            result = json.load(f)
    parts = {p["part"]: p["status"] for p in result["parts"]}
    assert parts["flashinfer"] == parts["torch"] == parts["sanitizer:memcheck"] == "SKIP", parts
    assert all(parts[name] == "PASS" for name in ("kernels", "build", "conformance", "same", "bench")), parts
    rows = result["rows"]

    def of(section):
        return [r for r in rows if r["section"] == section]

    assert result["mock"] and result["device"]["name"], result["device"]
    assert of("ceiling")[0]["gb_s"] > 0 and not of("left_out"), rows
    assert {r["preset"] for r in of("decode")} == {r["preset"] for r in of("prefill")} == {r["preset"] for r in of("store")} == PRESETS
    assert len(of("same")) == 6 * len(PRESETS) and all(r["equal"] for r in of("same")), of("same")
    f16 = next(r for r in of("decode") if r["preset"] == "f16")  # bytes by hand: K and V, 8 heads, 128 numbers, 2 bytes
    assert f16["bytes"] == f16["batch"] * (f16["context"] + 1) * 2 * 8 * 128 * 2, f16
    assert len(of("host")) >= 6 and all(r.get("us", r.get("count")) > 0 for r in of("host")), of("host")

    gpu = report("gpu")
    figures = gpu.Check(result).figures()
    assert set(figures) <= {name for name, _, _ in gpu.targets()} and {"tflops", "layer"} <= set(figures), figures
    vulkan_part(parts, rows)


def vulkan_part(parts, rows):
    assert parts["vulkan:conformance"] == parts["vulkan:bench"], parts
    if parts["vulkan:bench"] == "SKIP":
        raise Skip("lavapipe, Mesa's Vulkan driver for the CPU, is not there (make deps)")
    assert parts["vulkan:bench"] == "PASS", parts
    report("gpu")
    vulkan = report("vulkan")
    found = vulkan.Rows(rows, "vulkan ")
    assert found.device()["cpu"] and found.of("ceiling")[0]["gb_s"] > 0 and not found.of("left_out"), found.of("left_out")
    assert {r["preset"] for r in found.of("decode")} == {r["preset"] for r in found.of("prefill")} == {r["preset"] for r in found.of("store")} == PRESETS
    assert all(r["us"] > 0 for r in found.of("host") + found.of("copies")) and len(found.of("host")) == 4, found.of("host")
    assert len(found.of("same")) == 6 * len(PRESETS) and all(r["equal"] for r in found.of("same")), found.of("same")
    f16 = found.of("decode", preset="f16")[0]  # bytes by hand: K and V, 8 heads, dim numbers, 2 bytes
    assert f16["bytes"] == f16["batch"] * (f16["context"] + 1) * 2 * 8 * f16["dim"] * 2, f16


if __name__ == "__main__":
    sys.exit(run_functions(globals()))
