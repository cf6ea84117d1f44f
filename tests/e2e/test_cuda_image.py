#!/usr/bin/env python3
"""kernels_cuda/kvlite_cuda_kernels.h: is it what the kernels' sources make, and can every compiler take it?

usage: test_cuda_image.py [-k WORD] [BUILD_FOLDER]      -k: only the cases with WORD in their name

Needs no nvcc. Oracle of the text: a decoder in C, by what the header says of itself.
"""
import os
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile

from cases import Skip, run_functions

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "tools"))
import kernels  # pylint: disable=wrong-import-position

ONLY = sys.argv[2] if sys.argv[1:2] == ["-k"] else ""
HEADER = os.path.join(ROOT, kernels.HEADER)
SCRATCH = tempfile.TemporaryDirectory()
MAX_BYTES = 4 << 20
MAX_SECONDS = 1.5  # of processor time

DECODER = """
#include "kvlite_cuda_kernels.h"
#include <stdio.h>
int main(void) {
    uint32_t left = kvli_cu_image_bytes;
    for (int chunk = 0; kvli_cu_image[chunk]; chunk++) {
        for (const char *p = kvli_cu_image[chunk]; *p; p += 5) {
            uint32_t v = 0;
            for (int i = 0; i < 5; i++) v = v * 85 + (uint32_t)(p[i] - 35 - (p[i] > '?') - (p[i] > '\\\\'));
            for (int shift = 24; shift >= 0 && left; shift -= 8, left--) putchar((int)(v >> shift & 255));
        }
    }
    fprintf(stderr, "%s %d\\n", kvli_cu_image_hash, kvli_cu_image_min_driver);
    return left != 0;
}
"""


def check(folder, *arguments):
    return subprocess.run([sys.executable, os.path.join(folder, "tools", "kernels.py"), "check", *arguments],
                          capture_output=True, text=True, timeout=60, check=False)


def copy_with(change):
    """A checkout's kernels after change(folder)."""
    folder = tempfile.mkdtemp(dir=SCRATCH.name)
    shutil.copytree(os.path.join(ROOT, "kernels_cuda"), os.path.join(folder, "kernels_cuda"))
    shutil.copytree(os.path.join(ROOT, "tools"), os.path.join(folder, "tools"))
    change(os.path.join(folder, "kernels_cuda"))
    return folder


def edit(path, pattern, text):
    with open(path, encoding="utf-8") as f:
        before = f.read()
    after = re.sub(pattern, text, before, count=1)
    assert after != before, pattern
    with open(path, "w", encoding="utf-8") as f:
        f.write(after)


def test_is_current():
    done = check(ROOT)
    assert done.returncode == 0, done.stderr
    print(done.stdout.strip())


def test_changes_are_found():
    cases = {
        "a kernel": (lambda d: edit(os.path.join(d, "store.cu"), ";", "; "), "from other sources"),
        "what it includes": (lambda d: edit(os.path.join(d, "abi.h"), ";", "; "), "from other sources"),
        "a new file": (lambda d: open(os.path.join(d, "new.cu"), "w", encoding="utf-8").close(), "other sources"),
        "a digit": (lambda d: edit(os.path.join(d, "kvlite_cuda_kernels.h"), r"(?<=#)[$-/](?=#)", "0"), "damaged"),
        "none": (lambda d: os.remove(os.path.join(d, "kvlite_cuda_kernels.h")), "not there"),
    }
    for name, (change, message) in cases.items():
        done = check(copy_with(change))
        assert done.returncode != 0 and message in done.stderr and "make kernels" in done.stderr, (name, done.stderr)


def test_text_comes_back():
    random.seed(7)
    for size in [0, 1, 2, 3, 4, 5, 4095, 4096, 10000]:
        for data in [bytes(size), b"\xff" * size, random.randbytes(size)]:
            text = kernels.encode(data)
            assert kernels.decode(text, size) == data
            assert not set(text) & set('"\\?') and all("!" < c < "~" for c in text)


def compilers():
    for variable, default, standard, language in (("CC", "gcc", "c99", "c"), ("CXX", "g++", "c++11", "c++"),
                                                  ("CLANG", "clang", "c99", "c"), ("CLANGXX", "clang++", "c++11", "c++")):
        command = shlex.split(os.environ.get(variable, default))
        if shutil.which(command[0]):
            yield [*command, "-x", language, "-std=" + standard, "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O2"]


def test_compilers_take_it():
    size = os.path.getsize(HEADER)
    assert size <= MAX_BYTES, f"{size} bytes"
    with open(HEADER, encoding="utf-8") as f:
        longest = max(len(literal) for literal in re.findall(r'"([^"\n]*)"', f.read()))
    assert longest < 4096, f"a literal of {longest} characters"
    unit = os.path.join(SCRATCH.name, "unit.c")
    with open(unit, "w", encoding="utf-8") as f:
        f.write('#include "kvlite_cuda_kernels.h"\nint nothing;\n')
    tried = 0
    for command in compilers():
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run([*command, "-I", os.path.dirname(HEADER), "-c", unit, "-o", unit + ".o"], check=True, timeout=60)
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        print(f"{command[0]} {command[3]}: {seconds:.2f} s")
        assert seconds <= MAX_SECONDS
        tried += 1
    if not tried:
        raise Skip("there is no compiler")


def test_decoder_in_c():
    source, program = os.path.join(SCRATCH.name, "decode.c"), os.path.join(SCRATCH.name, "decode")
    with open(source, "w", encoding="utf-8") as f:
        f.write(DECODER)
    for command in compilers():
        subprocess.run([*command, "-I", os.path.dirname(HEADER), source, "-o", program], check=True, timeout=60)
        done = subprocess.run([program], capture_output=True, check=True, timeout=60)
        assert done.stdout == kernels.unpack(HEADER)
        assert done.stdout[:4] == bytes.fromhex("50ed55ba"), "that is no fatbin"
        source_hash, driver = done.stderr.decode().split()
        os.chdir(ROOT)
        assert source_hash == kernels.source_hash() and int(driver) >= 12000


if __name__ == "__main__":
    sys.exit(run_functions(globals(), ONLY))
