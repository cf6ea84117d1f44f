#!/usr/bin/env python3
"""build/vram: the README's table is what it prints, and its bytes are those that a hand counts.

usage: test_vram.py [BUILD_FOLDER]

Oracle: bits a number as the README's table of formats has them (at dim 128), and the rule which blocks stay exact.
"""
import os
import re
import subprocess
import sys
import tempfile

from cases import run_functions

BUILD = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("BUILD", "build")
BLOCK = 32
BITS = {"f16": 16, "int8+": 8.625, "int8": 8.25, "fp8": 8.25, "balanced": 6.375, "int4": 4.75, "nvfp4": 4.5}
UNITS = {"MiB": 2**20, "GiB": 2**30}


def vram(*args):
    return subprocess.run([os.path.join(BUILD, "vram"), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          timeout=60, check=False)


def rows(*args):
    """{(model, tokens): {preset: bytes}}"""
    lines = [[c.strip() for c in line.strip("|\n").split("|")] for line in vram(*args).stdout.splitlines()]
    found, name = {}, ""
    for cells in lines[2:]:
        name = cells[0] or name
        tokens = int(cells[1].replace("k", "")) * (1024 if cells[1].endswith("k") else 1)
        found[name, tokens] = {p: float(c.split()[0]) * UNITS[c.split()[1]] for p, c in zip(lines[0][2:], cells[2:])}
    return found


def by_hand(layers, kv_heads, dim, tokens, preset):
    """Whole blocks: the first, the open one and one more are exact where the others are packed; else one more in all."""
    number = layers * kv_heads * dim * 2 * BLOCK / 8
    blocks = -(-tokens // BLOCK)
    return number * 16 * (blocks + 1) if preset == "f16" else number * (16 * 3 + BITS[preset] * (blocks - 1))


def test_readme():
    with open("README.md", encoding="utf-8") as f:
        text = f.read()
    table = re.search(r"<!-- vram -->\n(.*?)<!-- /vram -->\n", text, re.S)
    assert table, "README.md has no table"
    assert table.group(1) == vram().stdout, "run: build/vram --readme README.md"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "README.md")
        with open(path, "w", encoding="utf-8") as f:
            f.write(text.replace(table.group(1), "| old |\n"))
        assert vram("--readme", path).returncode == 0
        with open(path, encoding="utf-8") as f:
            assert f.read() == text


def test_bytes():
    shapes = {"Llama 3.1 8B": (32, 8, 128), "Qwen2.5 7B": (28, 4, 128), "Phi-4 14B": (40, 10, 128), "Llama 3.3 70B": (80, 8, 128)}
    all_rows = rows("--tokens", "1000,8192,16384")
    assert {preset for r in all_rows.values() for preset in r} == set(BITS)
    for name, shape in shapes.items():
        for tokens in (1000, 8192, 16384):
            for preset, got in all_rows[name, tokens].items():
                want = by_hand(*shape, tokens, preset)
                assert abs(got / want - 1) < 0.01, f"{name}, {tokens} tokens, {preset}: {got:.0f}, by hand {want:.0f}"


def test_windows():
    """Gemma 3 4B: 5 of 34 layers see all, 29 only 1,024 tokens."""
    got = rows("--model", "gemma 3 4b", "--kv", "f16", "--tokens", "131072")["Gemma 3 4B", 131072]["f16"]
    full = by_hand(5, 4, 256, 131072, "f16")
    most = full + by_hand(29, 4, 256, 1024 + 4 * BLOCK, "f16")
    assert full + by_hand(29, 4, 256, 1024, "f16") <= got * 1.005 and got <= most * 1.005, (full, got, most)


def test_longest():
    assert ("SmolLM2 135M", 32768) not in rows() and ("SmolLM2 135M", 8192) in rows()


def test_bad_options():
    with tempfile.NamedTemporaryFile("w", suffix=".md") as f:
        f.write("no table\n")
        f.flush()
        done = vram("--readme", f.name)
        assert done.returncode == 1 and "vram -->" in done.stderr, done
    for args, word in ((["--kv", "int3"], "int3"), (["--tokens", "8k"], "--tokens"), (["--fast"], "--fast"),
                       (["--tokens", "0"], "--tokens"), (["--readme"], "--readme")):
        done = vram(*args)
        assert done.returncode == 2 and word in done.stderr, done


if __name__ == "__main__":
    sys.exit(run_functions(globals()))
