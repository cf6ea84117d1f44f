#!/usr/bin/env python3
"""Compiles kernels_cuda/*.cu and writes them, compressed, as C into kernels_cuda/kvlite_cuda_kernels.h.

usage: kernels.py build [--nvcc NVCC] [-j N] [-o HEADER] [--work FOLDER]   compile what changed, write the header
       kernels.py check [HEADER]               is the header the one of these sources? Needs no nvcc
       kernels.py unpack HEADER FOLDER         the cubins and the PTX that the header holds
       kernels.py ptx ARCH,... FOLDER          all kernels as one PTX for each architecture (it runs on newer devices)

A kernel that spills registers fails the build. The same sources and the same nvcc give the same bytes.
"""

import argparse
import base64
import concurrent.futures
import hashlib
import lzma
import os
import re
import shutil

from kernel_sources import ROOT, check_header, fail, hash_of, read, run, write_if_other

SOURCES = "kernels_cuda"
HEADER = SOURCES + "/kvlite_cuda_kernels.h"
TEXTS = "tables.h", "abi.h", "unpack.h"  # what they say stands in the header
# (cubin, the PTX that it is made from): the code paths of the kernels are those of 75, 80, 89 and 90. A cubin runs on later
# minors of its major: 80 on 86 and 87, 100f and 120f on their whole family. Those that are alike are one compressed stream
# (a tenth less text), of which a device unpacks what comes before its own: the likeliest stand first.
ARCHS = [("89", "89"), ("80", "80"), ("90", "90"), ("75", "75"), ("120f", "90"), ("100f", "90")]
PTX = "90"  # for what comes after; only the commonest head dims, since it would be as large as four cubins
PTX_LEAVES_OUT = re.compile(r"_d(80|96|192|256)(_|$)")
SINCE = {"100f": (12, 9), "120f": (12, 9)}  # the first nvcc that knows it
FLAGS = ["-std=c++17", "-O3", "-I" + SOURCES]
CHUNK = 4000  # characters in a string literal: C99 promises 4095
ALPHABET = "".join(chr(c) for c in range(35, 122) if chr(c) not in "?\\")
RFC1924 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"  # Python's base 85


# ---- the image as text ----

def encode(image):
    image += bytes(-len(image) % 4)
    return base64.b85encode(image).decode().translate(str.maketrans(RFC1924, ALPHABET))


def decode(text, size):
    """By the comment in the header and by nothing else, to prove that it says enough."""
    out = bytearray()
    for i in range(0, len(text), 5):
        v = 0
        for c in text[i:i + 5]:
            v = v * 85 + ord(c) - 35 - (c > "?") - (c > "\\")
        out += v.to_bytes(4, "big")
    return bytes(out[:size])


def lzma_filter(bits):
    lc, lp, pb = bits
    return [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "lc": lc, "lp": lp, "pb": pb, "dict_size": 1 << 26}]


def unpack(header):
    """[(arch, is it PTX, its bytes)]"""
    text = read(header)
    begin = text.index("kvli_cu_image[] = {")
    chunks = re.findall(r'^"([^"]*)",$', text[begin:text.index("\n0};", begin)], re.M)
    begin = text.index("kvli_cu_parts[] = {")
    streams = {}
    for line in re.findall(r"^    \{(.*)\},$", text[begin:text.index("};", begin)], re.M):
        arch, ptx, chunk, packed, before, raw, *bits = (int(v) for v in line.split(", "))
        if chunk not in streams:
            digits = (packed + 3) // 4 * 5
            data = decode("".join(chunks[chunk:chunk + (digits + CHUNK - 1) // CHUNK]), packed)
            streams[chunk] = lzma.decompress(data, lzma.FORMAT_RAW, filters=lzma_filter(bits))
        yield arch, ptx, streams[chunk][before:before + raw]


# ---- the sources ----

def source_files():
    names = os.listdir(SOURCES)
    return sorted(n for n in names if n.endswith((".cu", ".cuh")) or n in TEXTS)


def text_files():
    return [os.path.join(SOURCES, name) for name in TEXTS]


def source_hash():
    return hash_of(os.path.join(SOURCES, name) for name in source_files())


def with_includes(name, seen):
    """The names of a source and of all in the folder that it includes."""
    if name not in seen:
        seen.add(name)
        for included in re.findall(r'^\s*#\s*include\s+"([^"]+)"', read(os.path.join(SOURCES, name)), re.M):
            if os.path.exists(os.path.join(SOURCES, included)):
                with_includes(included, seen)
    return seen


# ---- nvcc ----

class Toolkit:
    def __init__(self, nvcc):
        self.nvcc = shutil.which(nvcc) or shutil.which("/usr/local/cuda/bin/nvcc")
        if not self.nvcc:
            fail("nvcc is not there (NVCC= names it); only those who change kernels need it")
        self.bin = os.path.dirname(os.path.realpath(self.nvcc))
        text = run([self.nvcc, "--version"])
        release = re.search(r"release (\d+)\.(\d+), V([\d.]+)", text)
        self.release = int(release.group(1)), int(release.group(2))
        self.version = release.group(3)
        self.archs = [(a, f) for a, f in ARCHS if self.release >= SINCE.get(a, (0, 0))]

    def tool(self, name):
        return os.path.join(self.bin, name)


def object_path(work, name, target):
    return "%s/%s.%s.%s" % (work, name.rsplit(".", 1)[0], target, "ptx" if target.startswith("compute_") else "cubin")


def make(kit, out, key, command, say):
    """Runs the command that makes `out` unless what `key` says is there already; returns what it printed."""
    key = hashlib.sha256((" ".join(command[1:]) + kit.version + key).encode()).hexdigest() + "\n"
    if os.path.exists(out + ".log") and os.path.exists(out):
        log = read(out + ".log")
        if log.startswith(key):
            return log[len(key):]
    print("  %-5s %s" % (os.path.basename(command[0]).upper(), say), flush=True)
    report = run(command)
    for line in report.splitlines():
        if "warning" in line:
            print("%s: %s" % (say, line))
    with open(out + ".log", "w", encoding="utf-8") as f:
        f.write(key + report)
    return report


def compile_ptx(kit, name, arch, work):
    target = "compute_" + arch
    out = object_path(work, name, target)
    texts = [read(os.path.join(SOURCES, n)) for n in sorted(with_includes(name, set()))]
    make(kit, out, "".join(texts),
         [kit.nvcc, *FLAGS, "-arch=" + target, "-ptx", "%s/%s" % (SOURCES, name), "-o", out],
         "%s %s" % (name, target))
    return out


def join(front, work):
    """All files' PTX as one, which makes one cubin. (Linked from relocatable ones, kernels would spill registers.)"""
    out = object_path(work, "kernels", "compute_" + front)
    text = join_ptx([object_path(work, n, "compute_" + front) for n in source_files() if n.endswith(".cu")])
    write_if_other(out, text)
    return out


def assemble(kit, arch, ptx, work):
    """Returns ptxas' report."""
    out = object_path(work, "kernels", "sm_" + arch)
    return make(kit, out, read(ptx), [kit.tool("ptxas"), "-v", "-arch=sm_" + arch, ptx, "-o", out], "sm_" + arch)


def ptxas_report(text):
    """(function, stack bytes, spilled bytes, registers, static shared memory) of each in a report of ptxas -v."""
    name = stack = spill = None
    for line in text.splitlines():
        if found := re.search(r"Function properties for (\S+)", line):
            name = found.group(1)
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, spill = int(found.group(1)), int(found.group(2)) + int(found.group(3))
            if spill:
                yield name, stack, spill, 0, 0
        elif found := re.search(r"Used (\d+) registers", line):
            smem = re.search(r"(\d+) bytes smem", line)
            yield name, stack, spill, int(found.group(1)), int(smem.group(1)) if smem else 0


def compile_all(kit, work, jobs):
    """{arch: ptxas' report}, everything compiled that changed"""
    os.makedirs(work, exist_ok=True)
    files = [n for n in source_files() if n.endswith(".cu")]
    files.sort(key=lambda n: -os.path.getsize(os.path.join(SOURCES, n)))  # the longest first
    fronts = sorted({front for _, front in kit.archs} | {PTX}, key=int)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        try:
            for done in [pool.submit(compile_ptx, kit, f, front, work) for f in files for front in fronts]:
                done.result()
            ptx = {front: join(front, work) for front in fronts}
            todo = {arch: pool.submit(assemble, kit, arch, ptx[front], work) for arch, front in kit.archs}
            reports = {arch: todo[arch].result() for arch in todo}
        except SystemExit:
            pool.shutdown(cancel_futures=True)
            raise
    spills = sorted({"%s on sm_%s spills %d bytes" % (name, arch, spill) for arch, text in reports.items()
                     for name, _, spill, _, _ in ptxas_report(text) if spill})
    if spills:
        fail("registers are spilled:\n  " + "\n  ".join(spills))
    return reports


def join_ptx(paths, leave_out=None):
    """One PTX module of several: one head, what more than one declares (dynamic shared memory) once, and the kernels whose
    names `leave_out` does not find."""
    head, body, declared, skipping = None, [], set(), False
    for path in paths:
        text = re.sub(r"^//.*\n", "", read(path), flags=re.M)
        begin = re.search(r"^\.address_size .*\n", text, re.M).end()
        head = head or text[:begin]
        for line in text[begin:].splitlines():
            entry = re.match(r"\.visible \.entry (\w+)", line)
            skipping = skipping or bool(entry and leave_out and leave_out.search(entry.group(1)))
            if skipping:
                skipping = line != "}"
                continue
            if line.startswith(".extern"):
                if line in declared:
                    continue
                declared.add(line)
            body.append(line)
    return head.lstrip() + "\n".join(body) + "\n"


def parts_of(kit, work):
    """[(arch, is it PTX, bytes)]"""
    parts = []
    for arch, _ in kit.archs:
        with open(object_path(work, "kernels", "sm_" + arch), "rb") as f:
            parts.append((int(arch.rstrip("f")), 0, f.read()))
    ptx = join_ptx([object_path(work, n, "compute_" + PTX) for n in source_files() if n.endswith(".cu")], PTX_LEAVES_OUT)
    return parts + [(int(PTX), 1, ptx.encode() + b"\0")]


# ---- the header ----

TEXT = """\
/* Generated by tools/kernels.py (make kernels) from kernels_cuda/: not to be edited. What kernels_cuda/tables.h, abi.h and unpack.h
   say, then the kernels by nvcc %(version)s: code for %(archs)s, PTX for compute_%(ptx)s.
   SHA-256 of what is packed: %(sum)s */
%(texts)s
#ifndef KVLI_CUDA_KERNELS_H
#define KVLI_CUDA_KERNELS_H

/* SHA-256 of the sources; the least cuDriverGetVersion that loads the kernels. */
static const char kvli_cu_image_hash[] = "%(hash)s";
static const int kvli_cu_image_min_driver = %(driver)d;
static const kvli_cu_part kvli_cu_parts[] = {
%(parts)s
};
static const char *const kvli_cu_image[] = {
%(chunks)s
0};

#endif
"""


def streams_of(parts):
    """What is packed together, with the (lc, lp, pb) of LZMA that suit it; instructions stand at multiples of 16."""
    code = [p for p in parts if not p[1]]
    return [((0, 4, 4), [p for p in code if p[0] < 100]), ((0, 4, 4), [p for p in code if p[0] >= 100]),
            ((3, 0, 0), [p for p in parts if p[1]])]


def pack(stream):
    bits, parts = stream
    return lzma.compress(b"".join(data for _, _, data in parts), lzma.FORMAT_RAW, filters=lzma_filter(bits))


def sum_of(parts):
    return hashlib.sha256(b"".join(data for _, _, data in parts)).hexdigest()


def header_text(kit, parts, jobs):
    chunks, table, streams = [], [], streams_of(parts)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for (bits, members), packed in zip(streams, pool.map(pack, streams)):
            before = 0
            for arch, ptx, data in members:
                numbers = arch, ptx, len(chunks), len(packed), before, len(data), *bits
                table.append("    {%s}," % ", ".join(str(n) for n in numbers))
                before += len(data)
            text = encode(packed)
            chunks += ['"%s",' % text[i:i + CHUNK] for i in range(0, len(text), CHUNK)]
    return TEXT % {"version": kit.version, "archs": ", ".join("sm_" + a for a, _ in kit.archs), "ptx": PTX,
                   "texts": "\n".join(read(t) for t in text_files()), "hash": source_hash(),
                   "sum": sum_of(parts), "driver": kit.release[0] * 1000, "parts": "\n".join(table),
                   "chunks": "\n".join(chunks)}


def build(args):
    kit = Toolkit(args.nvcc)
    for arch, _ in ARCHS:
        if arch not in dict(kit.archs):
            print("kernels.py: nvcc %s does not know sm_%s: left out" % (kit.version, arch))
    compile_all(kit, args.work, args.jobs)
    parts = parts_of(kit, args.work)
    text = header_text(kit, parts, args.jobs)
    write_if_other(args.output, text)
    if list(unpack(args.output)) != parts:
        fail("what was written does not give the kernels back")
    print("%s: %d bytes" % (args.output, len(text)))


def check(args):
    text = check_header(args.header, "kernels-cuda", "kvli_cu_image_hash", source_hash(), text_files())
    try:
        parts = list(unpack(args.header))
    except (lzma.LZMAError, OverflowError):
        parts = []
    if "SHA-256 of what is packed: %s " % sum_of(parts) not in text:
        fail("%s: its kernels are damaged: run `make kernels-cuda`" % args.header)
    print("%s is current: %d bytes" % (args.header, len(text)))


def write_parts(args):
    os.makedirs(args.folder, exist_ok=True)
    for arch, ptx, data in unpack(args.header):
        with open("%s/kernels_%d.%s" % (args.folder, arch, "ptx" if ptx else "cubin"), "wb") as f:
            f.write(data)


def write_ptx(args):
    kit = Toolkit(args.nvcc)
    os.makedirs(args.work, exist_ok=True)
    os.makedirs(args.folder, exist_ok=True)
    for arch in args.archs.split(","):
        paths = [compile_ptx(kit, name, arch, args.work) for name in source_files() if name.endswith(".cu")]
        with open("%s/kernels_%s.ptx" % (args.folder, arch), "w", encoding="utf-8") as f:
            f.write(join_ptx(paths))


def main():
    os.chdir(ROOT)
    parser = argparse.ArgumentParser(usage=__doc__.split("usage: ")[1].split("\n\n")[0])
    commands = parser.add_subparsers(required=True)

    def command(name, function):
        p = commands.add_parser(name)
        p.set_defaults(run=function)
        p.add_argument("--nvcc", default="nvcc")
        p.add_argument("--work", default="build/kernels")
        p.add_argument("-j", "--jobs", type=int, default=os.cpu_count())
        return p

    command("build", build).add_argument("-o", "--output", default=HEADER)
    command("check", check).add_argument("header", nargs="?", default=HEADER)
    p = command("unpack", write_parts)
    p.add_argument("header")
    p.add_argument("folder")
    p = command("ptx", write_ptx)
    p.add_argument("archs")
    p.add_argument("folder")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
