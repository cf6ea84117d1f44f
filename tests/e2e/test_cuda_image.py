#!/usr/bin/env python3
"""kernels_cuda/kvlite_cuda_kernels.h: is it what the kernels' sources make, and can every compiler take it?

usage: test_cuda_image.py [-k WORD] [BUILD_FOLDER]      -k: only the cases with WORD in their name

Needs no nvcc. Python's lzma packs, the header's own C unpacks.
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

UNPACKER = """
#include "kvlite_cuda_kernels.h"
#include <stdio.h>
#include <stdlib.h>
int main(int argc, char *argv[]) {
    (void)argv;
    const uint32_t n = sizeof kvli_cu_parts / sizeof kvli_cu_parts[0];
    if (argc > 1) { /* what devices get */
        for (uint32_t arch = 70; arch < 140; arch++) {
            const kvli_cu_part *part = kvli_cu_find_part(kvli_cu_parts, n, arch);
            printf("%d ", part ? (int)(part->arch * 10 + part->ptx) : 0);
        }
        return 0;
    }
    uint16_t *probs = (uint16_t *)malloc(KVLI_CU_UNPACK_PROBS * sizeof *probs);
    for (uint32_t i = 0; i < n; i++) {
        const kvli_cu_part *part = &kvli_cu_parts[i];
        uint8_t *out = (uint8_t *)malloc(part->before + part->raw_bytes);
        if (!kvli_cu_unpack_part(kvli_cu_image, part, out, probs)) return 1;
        fwrite(out + part->before, 1, part->raw_bytes, stdout);
        free(out);
    }
    free(probs);
    fprintf(stderr, "%s %d\\n", kvli_cu_image_hash, kvli_cu_image_min_driver);
    return 0;
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
        "a digit": (lambda d: edit(os.path.join(d, "kvlite_cuda_kernels.h"), r'(?<=\n"[^"\n]{900})\w', "#"), "damaged"),
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


def test_unpacking_in_c():
    source, program = os.path.join(SCRATCH.name, "unpack.c"), os.path.join(SCRATCH.name, "unpack")
    with open(source, "w", encoding="utf-8") as f:
        f.write(UNPACKER)
    parts = list(kernels.unpack(HEADER))
    for command in compilers():
        subprocess.run([*command, "-I", os.path.dirname(HEADER), source, "-o", program], check=True, timeout=60)
        done = subprocess.run([program], capture_output=True, check=True, timeout=60)
        assert done.stdout == b"".join(data for _, _, data in parts)
        source_hash, driver = done.stderr.decode().split()
        os.chdir(ROOT)
        assert source_hash == kernels.source_hash() and int(driver) >= 12000
    for _, ptx, data in parts:
        assert b".version" in data[:20] and data.endswith(b"\0") if ptx else data.startswith(b"\x7fELF")
    found = dict(zip(range(70, 140), subprocess.run([program, "find"], capture_output=True, check=True,
                                                    timeout=60).stdout.split()))
    want = {70: 0, 75: 750, 80: 800, 86: 800, 87: 800, 89: 890, 90: 900, 100: 1000, 103: 1000, 110: 901, 120: 1200,
            121: 1200, 130: 901}
    assert all(int(found[arch]) == part for arch, part in want.items()), found


# Every byte of the kernels' text changed in turn would take long: some of them, and texts that end early. What comes out is
# wrong or refused, and nothing outside of the memory is touched.
DAMAGED = """
#include "unpack.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static char text[%d];
int main(void) {
    const char *image[] = {text, 0};
    static uint16_t probs[KVLI_CU_UNPACK_PROBS];
    kvli_cu_part part = {90, 0, 0, %d, 0, %d, 0, 4, 4};
    uint8_t *out = (uint8_t *)malloc(part.raw_bytes);
    static const char whole[] = "%s";
    uint32_t length = sizeof whole - 1, refused = 0, x = 1;
    for (uint32_t i = 0; i < 3000; i++) {
        memcpy(text, whole, sizeof whole);
        x = x * 1664525 + 1013904223;
        text[(x >> 8) %% length] = (char)(35 + (x >> 3) %% 27);
        if (i %% 3 == 0) text[(x >> 5) %% length] = 0;
        refused += !kvli_cu_unpack_part(image, &part, out, probs);
    }
    memcpy(text, whole, sizeof whole);
    if (!kvli_cu_unpack_part(image, &part, out, probs)) return 1;
    fwrite(out, 1, part.raw_bytes, stdout);
    fprintf(stderr, "%%u", refused);
    free(out);
    return 0;
}
"""


def test_damaged_text():
    random.seed(3)
    data = b"".join(random.choice([b"abcdefgh", b"instruction", random.randbytes(16)]) for _ in range(600))
    packed = kernels.lzma.compress(data, kernels.lzma.FORMAT_RAW, filters=kernels.lzma_filter((0, 4, 4)))
    text = kernels.encode(packed)
    source, program = os.path.join(SCRATCH.name, "damaged.c"), os.path.join(SCRATCH.name, "damaged")
    with open(source, "w", encoding="utf-8") as f:
        f.write(DAMAGED % (len(text) + 1, len(packed), len(data), '"\n"'.join(text[i:i + 100] for i in range(0, len(text), 100))))
    command = next(compilers(), None)
    if not command:
        raise Skip("there is no compiler")
    command = [c for c in command if c != "-Wpedantic"]  # the whole text is one literal here
    subprocess.run([*command, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-I", os.path.dirname(HEADER),
                    source, "-o", program], check=True, timeout=60)
    done = subprocess.run([program], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == data
    print(f"{done.stderr.decode()} of 3000 refused")


if __name__ == "__main__":
    sys.exit(run_functions(globals(), ONLY))
