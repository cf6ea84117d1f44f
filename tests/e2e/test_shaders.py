#!/usr/bin/env python3
"""kernels_vulkan/kvlite_vulkan_kernels.h: is it what the shaders' sources make, and is what it holds sound?

usage: test_shaders.py [-k WORD] [BUILD_FOLDER]      -k: only the cases with WORD in their name

Where glslangValidator and spirv-opt are not there, or are not those that the header names, it is not built again.
"""
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

from cases import Skip, run_functions

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "tools"))
import shaders  # pylint: disable=wrong-import-position

ONLY = sys.argv[2] if sys.argv[1:2] == ["-k"] else ""
HEADER = os.path.join(ROOT, shaders.HEADER)
SCRATCH = tempfile.TemporaryDirectory()
MAX_BYTES = 3 << 20
# SPIR-V: version 1.3 is that of Vulkan 1.1
SPIRV_1_3 = 0x10300
OP_DECORATE, OP_FUNCTION, NO_CONTRACTION, GLSL_FMA = 71, 54, 42, 50
ROUNDING = {129: "OpFAdd", 131: "OpFSub", 133: "OpFMul", 12: "OpExtInst"}


def tool(folder, *arguments):
    return subprocess.run([sys.executable, os.path.join(folder, "tools", "shaders.py"), *arguments],
                          capture_output=True, text=True, timeout=300, check=False)


def copy_with(change):
    """A checkout's shaders after change(folder)."""
    folder = tempfile.mkdtemp(dir=SCRATCH.name)
    for name in "kernels_cuda", "kernels_vulkan", "tools":
        shutil.copytree(os.path.join(ROOT, name), os.path.join(folder, name))
    change(folder)
    return folder


def edit(path, pattern, text):
    with open(path, encoding="utf-8") as f:
        before = f.read()
    after = re.sub(pattern, text, before, count=1)
    assert after != before, pattern
    with open(path, "w", encoding="utf-8") as f:
        f.write(after)


def modules():
    return list(shaders.unpack(HEADER))


def test_is_current():
    done = tool(ROOT, "check")
    assert done.returncode == 0, done.stderr
    print(done.stdout.strip())


def test_changes_are_found():
    def in_shaders(name):
        return lambda d: os.path.join(d, "kernels_vulkan", name)

    header = in_shaders("kvlite_vulkan_kernels.h")
    cases = {
        "a shader": (lambda d: edit(in_shaders("store.comp")(d), ";", "; "), "other sources"),
        "what it includes": (lambda d: edit(in_shaders("encode.glsl")(d), ";", "; "), "other sources"),
        "what both sides read": (lambda d: edit(in_shaders("abi.h")(d), "#define", "#define "), "other sources"),
        "the tables": (lambda d: edit(os.path.join(d, "kernels_cuda", "tables.h"), ";", "; "), "other sources"),
        "a new file": (lambda d: open(in_shaders("new.glsl")(d), "w", encoding="utf-8").close(), "other sources"),
        "the variants": (lambda d: edit(os.path.join(d, "tools", "shaders.py"), '"merge": 2', '"merge": 0'), "other sources"),
        "the text in the header": (lambda d: edit(header(d), "#define KVLI_VK_DIM 6", "#define KVLI_VK_DIM 7"), "hold the text"),
        "a word": (lambda d: edit(header(d), r"(?<=\n0x7230203,)\d+,", "1,"), "damaged"),
        "a word less": (lambda d: edit(header(d), r"\n0x7230203,\d+,", "\n0x7230203,"), "damaged"),
        "a module less": (lambda d: edit(header(d), r'\n    \{"copy".*', ""), "damaged"),
        "none": (lambda d: os.remove(header(d)), "not there"),
    }
    for name, (change, message) in cases.items():
        done = tool(copy_with(change), "check")
        assert done.returncode != 0 and message in done.stderr and "make kernels-vulkan" in done.stderr, (name, done.stderr)


def test_line_ends_do_not_count():
    def to_crlf(folder):
        path = os.path.join(folder, "kernels_vulkan", "encode.glsl")
        with open(path, "rb") as f:
            text = f.read()
        with open(path, "wb") as f:
            f.write(text.replace(b"\n", b"\r\n"))
    done = tool(copy_with(to_crlf), "check")
    assert done.returncode == 0, done.stderr


def test_every_variant_is_there():
    want = {(name, variant) for name, bits in shaders.VARIES_BY.items() for variant in range(8) if not variant & ~bits}
    assert {m[:2] for m in modules()} == want


def test_capabilities():
    for name, variant, words in modules():
        assert words[0] == shaders.MAGIC and words[1] == SPIRV_1_3, (name, variant)
        found = shaders.capabilities(words)
        assert 1 in found and not shaders.not_allowed(variant, words), (name, variant, found)
    fake = (shaders.MAGIC, SPIRV_1_3, 0, 9, 0, 2 << 16 | shaders.OP_CAPABILITY, 1, 2 << 16 | shaders.OP_CAPABILITY, 9)
    assert shaders.not_allowed(0, fake) == {9} and not shaders.not_allowed(1, fake)


def test_validator():
    if not shutil.which("spirv-val"):
        raise Skip("spirv-val is not there (make deps)")
    folder = os.path.join(SCRATCH.name, "modules")
    done = tool(ROOT, "unpack", HEADER, folder)
    assert done.returncode == 0, done.stderr
    names = os.listdir(folder)
    assert len(names) == len(modules())
    for name in names:
        done = subprocess.run(["spirv-val", *shaders.TARGET, os.path.join(folder, name)], capture_output=True, text=True,
                              timeout=60, check=False)
        assert done.returncode == 0, (name, done.stdout + done.stderr)


def instructions(words):
    at = 5
    while at < len(words):
        yield words[at] & 0xffff, words[at:at + (words[at] >> 16)]
        at += words[at] >> 16


def test_encoders_round_every_operation():
    """Bytes depend on it: no sum or product in the store shader may be fused with another."""
    rounded = 0
    for name, variant, words in modules():
        if name != "store":
            continue
        exact = {i[1] for op, i in instructions(words) if op == OP_DECORATE and i[2] == NO_CONTRACTION}
        for op, i in instructions(words):
            if op not in ROUNDING:
                continue
            assert op != 12 or i[4] != GLSL_FMA, (variant, "fma")
            assert op == 12 or i[2] in exact, (variant, ROUNDING[op], i[2])
            rounded += op != 12
    assert rounded > 50, rounded


def test_builds_again():
    missing = [t for t in shaders.TOOLS if not shutil.which(t)]
    if missing:
        raise Skip(f"{missing[0]} is not there (make deps)")
    with open(HEADER, encoding="utf-8") as f:
        before = f.read()
    if f"SPIR-V by {shaders.versions()}." not in before:
        raise Skip(f"the header is by other tools than {shaders.versions()}")
    out = os.path.join(SCRATCH.name, "again.h")
    done = tool(ROOT, "build", "-o", out, "--work", os.path.join(SCRATCH.name, "work"))
    assert done.returncode == 0, done.stderr
    with open(out, encoding="utf-8") as f:
        assert f.read() == before, "the same sources and tools give other bytes"


def test_what_must_not_be_fails():
    """A capability that the variant may not have, and a shader that does not compile, fail the build by name."""
    if not all(shutil.which(t) for t in shaders.TOOLS):
        raise Skip("glslang-tools or spirv-tools are not there (make deps)")
    body = ("#version 450\n#extension GL_ARB_gpu_shader_int64 : require\n"
            "layout(set = 0, binding = 0) buffer numbers { uint64_t x[]; };\nvoid main() { x[0] += %s; }\n")
    for text, message in (("5", "copy, variant 0, has capabilities"), ("nothing", "copy.comp:4: 'nothing'")):
        def change(folder):
            with open(os.path.join(folder, "kernels_vulkan", "copy.comp"), "w", encoding="utf-8") as f:
                f.write(body % text)
        folder = copy_with(change)
        done = tool(folder, "build", "-o", os.path.join(folder, "out.h"))
        assert done.returncode != 0 and message in done.stderr, (message, done.stdout + done.stderr)
        assert not os.path.exists(os.path.join(folder, "out.h"))


def test_compilers_take_it():
    size = os.path.getsize(HEADER)
    assert size <= MAX_BYTES, f"{size} bytes"
    print(f"{size} bytes")
    unit, tried = os.path.join(SCRATCH.name, "unit.c"), 0
    with open(unit, "w", encoding="utf-8") as f:
        f.write('#include "kvlite_vulkan_kernels.h"\n#include <stdio.h>\nint main(void) {\n'
                '    for (uint32_t i = 0; i < sizeof kvli_vk_shaders / sizeof kvli_vk_shaders[0]; i++)\n'
                '        printf("%s %u %u %u\\n", kvli_vk_shaders[i].name, (unsigned)kvli_vk_shaders[i].variant,\n'
                '               (unsigned)kvli_vk_shaders[i].n_words, (unsigned)kvli_vk_shaders[i].words[0]);\n'
                '    puts(kvli_vk_source_hash);\n    return 0;\n}\n')
    want = "".join(f"{name} {variant} {len(words)} {shaders.MAGIC}\n" for name, variant, words in modules())
    for variable, default, standard, language in (("CC", "gcc", "c99", "c"), ("CXX", "g++", "c++11", "c++"),
                                                  ("CLANG", "clang", "c99", "c"), ("CLANGXX", "clang++", "c++11", "c++")):
        command = shlex.split(os.environ.get(variable, default))
        if not shutil.which(command[0]):
            continue
        subprocess.run([*command, "-x", language, "-std=" + standard, "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-Wno-unused",
                        "-I", os.path.dirname(HEADER), unit, "-o", unit + ".out"], check=True, timeout=60)
        printed = subprocess.run([unit + ".out"], capture_output=True, text=True, check=True, timeout=60).stdout
        os.chdir(ROOT)
        assert printed == want + shaders.source_hash() + "\n"
        tried += 1
    if not tried:
        raise Skip("there is no compiler")


if __name__ == "__main__":
    sys.exit(run_functions(globals(), ONLY))
