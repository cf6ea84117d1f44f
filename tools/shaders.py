#!/usr/bin/env python3
"""Compiles kernels_vulkan/*.comp to SPIR-V and writes it as C into kernels_vulkan/kvlite_vulkan_kernels.h.

usage: shaders.py build [-o HEADER] [--work FOLDER] [-j N]   compile, optimise, validate, write the header
       shaders.py check [HEADER]               is the header the one of these sources? Needs no compiler
       shaders.py unpack HEADER FOLDER         the modules that the header holds, as SHADER.VARIANT.spv

Needs glslangValidator, spirv-opt and spirv-val. The same sources and the same tools give the same bytes. A module that has
a capability which its variant may not have fails the build.
"""

import argparse
import concurrent.futures
import hashlib
import os
import re
import shutil
import struct

from kernel_sources import ROOT, check_header, fail, hash_of, read, run, write_if_other

SOURCES = "kernels_vulkan"
HEADER = SOURCES + "/kvlite_vulkan_kernels.h"
# What they say stands in the header, of the last one after the shaders.
TEXTS = ["kernels_cuda/tables.h"] + [SOURCES + n for n in ("/vk_api.h", "/abi.h", "/device.h", "/selftest.h", "/pipelines.h")]
MACROS = {1: "KVL_FP16", 2: "KVL_STORAGE16", 4: "KVL_SUBGROUP"}  # bits of a variant, as in abi.h
VARIES_BY = {"store": 2, "decode": 1 | 2 | 4, "prefill": 1 | 2, "merge": 2, "copy": 0, "read": 0}
# What SPIR-V modules may need: always (Shader), and with each bit of the variant (Float16; StorageBuffer16BitAccess;
# GroupNonUniform, its Ballot and its Shuffle). The host asks for the features behind them.
CAPABILITIES = {0: {1}, 1: {9}, 2: {4433}, 4: {61, 64, 65}}
TOOLS = "glslangValidator", "spirv-opt", "spirv-val"
TARGET = ["--target-env", "vulkan1.1"]
# As spirv-opt -O, but loops are left to the driver, which knows the specialisation constants: modules are a third of the size.
OPTIMISE = """eliminate-dead-branches merge-return inline-entry-points-exhaustive eliminate-dead-functions
    eliminate-dead-code-aggressive private-to-local eliminate-local-single-block eliminate-local-single-store
    eliminate-dead-code-aggressive scalar-replacement=100 convert-local-access-chains eliminate-local-single-block
    eliminate-local-single-store eliminate-dead-code-aggressive ssa-rewrite eliminate-dead-code-aggressive ccp
    eliminate-dead-code-aggressive eliminate-dead-branches redundancy-elimination combine-access-chains simplify-instructions
    vector-dce eliminate-dead-inserts eliminate-dead-branches simplify-instructions if-conversion copy-propagate-arrays
    reduce-load-size eliminate-dead-code-aggressive merge-blocks redundancy-elimination eliminate-dead-branches merge-blocks
    simplify-instructions strip-debug compact-ids""".split()
MAGIC, OP_CAPABILITY = 0x07230203, 17


# ---- the sources ----

def source_files():
    names = sorted(n for n in os.listdir(SOURCES) if n.endswith((".comp", ".glsl")))
    return [os.path.join(SOURCES, n) for n in names] + text_files()


def text_files():
    return [t for t in TEXTS if os.path.exists(t)]


def source_hash():
    return hash_of(source_files(), repr((sorted(VARIES_BY.items()), TARGET, OPTIMISE)))


def variants():
    """[(shader, variant)] of those whose source is there."""
    for name, bits in VARIES_BY.items():
        if not os.path.exists("%s/%s.comp" % (SOURCES, name)):
            print("shaders.py: %s/%s.comp is not there: left out" % (SOURCES, name))
            continue
        for variant in range(8):
            if variant & ~bits == 0:
                yield name, variant


# ---- compiling ----

def versions():
    for tool in TOOLS:
        if not shutil.which(tool):
            fail("%s is not there (Debian: glslang-tools, spirv-tools); only those who change shaders need it" % tool)
    glslang = re.search(r"^Glslang Version: (\S+)", run([TOOLS[0], "--version"]), re.M).group(1)
    return "glslang %s, %s" % (glslang, run([TOOLS[1], "--version"]).split(" unknown")[0].splitlines()[0])


def words_of(data):
    return struct.unpack("<%dI" % (len(data) // 4), data)


def capabilities(words):
    at, found = 5, set()
    while at < len(words) and words[at] & 0xffff == OP_CAPABILITY:
        found.add(words[at + 1])
        at += words[at] >> 16
    return found


def not_allowed(variant, words):
    """Capabilities of a module that its variant may not have."""
    return capabilities(words) - set().union(*(c for bit, c in CAPABILITIES.items() if bit & variant == bit))


def compile_one(name, variant, work):
    out = "%s/%s.%d" % (work, name, variant)
    macros = ["-D%s=%d" % (macro, variant & bit != 0) for bit, macro in MACROS.items()]
    run([TOOLS[0], "-V", *TARGET, *macros, "%s/%s.comp" % (SOURCES, name), "-o", out + ".raw.spv"])
    run([TOOLS[1], "--target-env=vulkan1.1", *("--" + o for o in OPTIMISE), out + ".raw.spv", "-o", out + ".spv"])
    run([TOOLS[2], *TARGET, out + ".spv"])
    with open(out + ".spv", "rb") as f:
        words = words_of(f.read())
    if not_allowed(variant, words):
        fail("%s, variant %d, has capabilities that it may not have: %s" % (name, variant, sorted(not_allowed(variant, words))))
    return name, variant, words


# ---- the header ----

TEXT = """\
/* Generated by tools/shaders.py (make kernels-vulkan) from kernels_vulkan/: not to be edited. What kernels_cuda/tables.h and
   kernels_vulkan say, then the shaders, SPIR-V by %(versions)s.
   SHA-256 of the modules: %(sum)s */
%(texts)s
#ifndef KVLI_VULKAN_KERNELS_H
#define KVLI_VULKAN_KERNELS_H

typedef struct kvli_vk_shader {
    const char *name;
    uint32_t variant; /* KVLI_VK_FP16 | KVLI_VK_STORAGE16 | KVLI_VK_SUBGROUP */
    const uint32_t *words;
    uint32_t n_words;
} kvli_vk_shader;

/* SHA-256 of the sources. */
static const char kvli_vk_source_hash[] = "%(hash)s";
%(arrays)s
static const kvli_vk_shader kvli_vk_shaders[] = {
%(table)s
};

#endif
%(last)s"""


def array_text(name, variant, words):
    lines, line = [], ""
    for w in words:
        number = "%d," % w if w < 1000000 else "0x%x," % w
        if len(line) + len(number) > 120:
            lines.append(line)
            line = ""
        line += number
    return "static const uint32_t kvli_vk_%s_%d[] = {\n%s};" % (name, variant, "\n".join(lines + [line]))


def sum_of(modules):
    h = hashlib.sha256()
    for name, variant, words in modules:
        h.update(b"%s %d %d\n" % (name.encode(), variant, len(words)) + struct.pack("<%dI" % len(words), *words))
    return h.hexdigest()


def header_text(modules):
    table = ['    {"%s", %d, kvli_vk_%s_%d, %d},' % (name, variant, name, variant, len(words))
             for name, variant, words in modules]
    return TEXT % {"versions": versions(), "sum": sum_of(modules), "texts": "\n".join(map(read, TEXTS[:-1])), "last": read(TEXTS[-1]),
                   "hash": source_hash(), "arrays": "\n".join(array_text(*m) for m in modules), "table": "\n".join(table)}


def unpack(header):
    """[(shader, variant, words)]"""
    text = read(header)
    for name, variant, count in re.findall(r'^    \{"(\w+)", (\d), kvli_vk_\w+, (\d+)\},$', text, re.M):
        begin = text.index("kvli_vk_%s_%s[] = {" % (name, variant))
        body = text[text.index("\n", begin):text.index("};", begin)]
        words = tuple(int(w, 0) for w in re.findall(r"\w+", body))
        if len(words) != int(count):
            raise ValueError("%s.%s has %d words" % (name, variant, len(words)))
        yield name, int(variant), words


def build(args):
    versions()  # are the tools there?
    os.makedirs(args.work, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        todo = [pool.submit(compile_one, name, variant, args.work) for name, variant in variants()]
        modules = [t.result() for t in todo]
    if not modules:
        fail("there is no shader in %s/" % SOURCES)
    text = header_text(modules)
    write_if_other(args.output, text)
    if list(unpack(args.output)) != modules:
        fail("what was written does not give the modules back")
    print("%s: %d modules, %d bytes" % (args.output, len(modules), len(text)))


def check(args):
    text = check_header(args.header, "kernels-vulkan", "kvli_vk_source_hash", source_hash(), text_files())
    try:
        modules = list(unpack(args.header))
    except ValueError:
        modules = []
    if "SHA-256 of the modules: %s " % sum_of(modules) not in text:
        fail("%s: its shaders are damaged: run `make kernels-vulkan`" % args.header)
    print("%s is current: %d modules, %d bytes" % (args.header, len(modules), len(text)))


def write_parts(args):
    os.makedirs(args.folder, exist_ok=True)
    for name, variant, words in unpack(args.header):
        with open("%s/%s.%d.spv" % (args.folder, name, variant), "wb") as f:
            f.write(struct.pack("<%dI" % len(words), *words))


def main():
    os.chdir(ROOT)
    parser = argparse.ArgumentParser(usage=__doc__.split("usage: ")[1].split("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("build")
    p.set_defaults(run=build)
    p.add_argument("-o", "--output", default=HEADER)
    p.add_argument("--work", default="build/shaders")
    p.add_argument("-j", "--jobs", type=int, default=os.cpu_count())
    p = commands.add_parser("check")
    p.set_defaults(run=check)
    p.add_argument("header", nargs="?", default=HEADER)
    p = commands.add_parser("unpack")
    p.set_defaults(run=write_parts)
    p.add_argument("header")
    p.add_argument("folder")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
