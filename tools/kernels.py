#!/usr/bin/env python3
"""Compiles kernels_cuda/*.cu into one compressed image and writes it as C into kernels_cuda/kvlite_cuda_kernels.h.

usage: kernels.py build [--nvcc NVCC] [-j N] [-o HEADER] [--work FOLDER]   compile what changed, write the header
       kernels.py check [HEADER]               is the header the one of these sources? Needs no nvcc
       kernels.py unpack HEADER FILE           the image that the header holds
       kernels.py ptx ARCH,... FOLDER          a PTX-only image per architecture (its paths run on newer devices)
       kernels.py figures [--bin FOLDER] [-o JSON]   what is known without a device: registers, occupancy, instructions

A kernel that spills registers fails the build. The same sources and the same nvcc give the same bytes.
"""

import argparse
import base64
import concurrent.futures
import hashlib
import os
import re
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SOURCES = "kernels_cuda"
HEADER = SOURCES + "/kvlite_cuda_kernels.h"
# Each runs on later minors of its major, 100f and 120f on their whole family; what comes after runs the PTX.
ARCHS = ["75", "80", "86", "89", "90", "100f", "120f"]
PTX = "90"
SINCE = {"100f": (12, 9), "120f": (12, 9)}  # the first nvcc that knows it
FLAGS = ["-std=c++17", "-O3", "-I" + SOURCES]
CHUNK = 4000  # characters in a string literal: C99 promises 4095
ALPHABET = "".join(chr(c) for c in range(35, 122) if chr(c) not in "?\\")
RFC1924 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"  # Python's base 85


def fail(text):
    sys.exit("kernels.py: " + text)


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


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


def unpack(header):
    text = read(header)
    begin = text.index("kvli_cu_image[] = {")
    chunks = re.findall(r'^"([^"]*)",$', text[begin:text.index("};", begin)], re.M)
    return decode("".join(chunks), int(constant(text, "kvli_cu_image_bytes")))


def constant(text, name):
    found = re.search(name + r'(?:\[\])? = "?(\w+?)u?"?;', text)
    if not found:
        raise ValueError("no %s in the header" % name)
    return found.group(1)


# ---- the sources ----

def source_files():
    names = os.listdir(SOURCES)
    return sorted(n for n in names if n.endswith((".cu", ".cuh")) or n == "abi.h")


def source_hash():
    h = hashlib.sha256()
    for name in source_files():
        with open(os.path.join(SOURCES, name), "rb") as f:
            data = f.read().replace(b"\r\n", b"\n")
        h.update(b"%s %d\n" % (name.encode(), len(data)) + data)
    return h.hexdigest()


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
        text = self.run([self.nvcc, "--version"])
        release = re.search(r"release (\d+)\.(\d+), V([\d.]+)", text)
        self.release = int(release.group(1)), int(release.group(2))
        self.version = release.group(3)
        self.archs = [a for a in ARCHS if self.release >= SINCE.get(a, (0, 0))]

    @staticmethod
    def run(command):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            fail("%s\n%s" % (" ".join(command), done.stdout))
        return done.stdout

    def tool(self, name):
        return os.path.join(self.bin, name)


def object_path(work, name, target):
    return "%s/%s.%s.%s" % (work, name.rsplit(".", 1)[0], target, "ptx" if target.startswith("compute_") else "cubin")


def compile_one(kit, name, target, work):
    """A relocatable cubin for sm_TARGET, or PTX for compute_TARGET; returns ptxas' report."""
    out = object_path(work, name, target)
    ptx = target.startswith("compute_")
    command = [kit.nvcc, *FLAGS, "-arch=" + target, *(["-ptx"] if ptx else ["-cubin", "-rdc=true", "-Xptxas=-v"])]
    key = hashlib.sha256(" ".join(command[1:] + [kit.version]).encode())
    for included in sorted(with_includes(name, set())):
        key.update(read(os.path.join(SOURCES, included)).encode())
    key = key.hexdigest() + "\n"
    if os.path.exists(out + ".log") and os.path.exists(out):
        log = read(out + ".log")
        if log.startswith(key):
            return log[len(key):]
    print("  NVCC  %s %s" % (name, target), flush=True)
    report = kit.run(command + ["-o", out, "%s/%s" % (SOURCES, name)])
    for line in report.splitlines():
        if "warning" in line:
            print("%s %s: %s" % (name, target, line))
    with open(out + ".log", "w", encoding="utf-8") as f:
        f.write(key + report)
    return report


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
    """reports[target][file], everything compiled that changed"""
    os.makedirs(work, exist_ok=True)
    files = [n for n in source_files() if n.endswith(".cu")]
    targets = ["sm_" + a for a in kit.archs] + ["compute_" + PTX]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        todo = {(t, f): pool.submit(compile_one, kit, f, t, work)
                # the longest first
                for f in sorted(files, key=lambda n: -os.path.getsize(os.path.join(SOURCES, n))) for t in targets}
        try:
            reports = {t: {f: todo[t, f].result() for f in files} for t in targets}
        except SystemExit:
            pool.shutdown(cancel_futures=True)
            raise
    spills = sorted({"%s on %s spills %d bytes" % (name, target, spill)
                     for target, by_file in reports.items() for text in by_file.values()
                     for name, _, spill, _, _ in ptxas_report(text) if spill})
    if spills:
        fail("registers are spilled:\n  " + "\n  ".join(spills))
    return reports


def join_ptx(paths):
    """One PTX module of several: one head, and what more than one declares (dynamic shared memory) once."""
    head, body, declared = None, [], set()
    for path in paths:
        text = re.sub(r"^//.*\n", "", read(path), flags=re.M)
        begin = re.search(r"^\.address_size .*\n", text, re.M).end()
        head = head or text[:begin]
        for line in text[begin:].splitlines():
            if line.startswith(".extern"):
                if line in declared:
                    continue
                declared.add(line)
            body.append(line)
    return head + "\n".join(body) + "\n"


def link(kit, work, reports):
    """One fatbin: for each architecture its cubins as one, and the PTX."""
    names = [n for n in source_files() if n.endswith(".cu")]
    images = []
    for arch in kit.archs:
        target = "sm_" + arch
        out = object_path(work, "linked", target)
        kit.run([kit.tool("nvlink"), "-arch=" + target, *[object_path(work, n, target) for n in names], "-o", out])
        with open(out, "rb") as f:
            code = f.read()
        for kernel in (k for text in reports[target].values() for k, *_ in ptxas_report(text)):
            if b".text.%s\0" % kernel.encode() not in code:
                fail("%s is not in what nvlink made for %s" % (kernel, target))
        images.append("--image3=kind=elf,sm=%s,file=%s" % (arch, out))
    out = object_path(work, "joined", "compute_" + PTX)
    with open(out, "w", encoding="utf-8") as f:
        f.write(join_ptx([object_path(work, n, "compute_" + PTX) for n in names]))
    kit.run([kit.tool("ptxas"), "-O0", "-arch=sm_" + PTX, out, "-o", work + "/ptx_check"])
    images.append("--image3=kind=ptx,sm=%s,file=%s" % (PTX, out))
    fatbin = work + "/kernels.fatbin"
    mode = ["--compress-mode=size"] if kit.release >= (12, 4) else ["--compress-all"]
    kit.run([kit.tool("fatbinary"), "-64", *mode, "--create=" + fatbin, *images])
    with open(fatbin, "rb") as f:
        return f.read()


# ---- the header ----

TEXT = """\
/* Generated by tools/kernels.py (make kernels) from kernels_cuda/: not to be edited. What kernels_cuda/abi.h says, then
   a fatbin of CUDA %(version)s with code for %(archs)s and PTX for compute_%(ptx)s,
   as cuModuleLoadData takes it, in text:
     A digit is a character c of value c - 35, less 1 if c > '?', less 1 if c > '\\\\': 0..84. Five digits, the first the
   most significant, are a number in base 85: four bytes, the first the most significant. The strings follow one another;
   kvli_cu_image_bytes bytes count, what is beyond them in the last group is 0.
   SHA-256 of the fatbin: %(sum)s */
%(abi)s
#ifndef KVLI_CUDA_KERNELS_H
#define KVLI_CUDA_KERNELS_H

/* SHA-256 of the sources; the least cuDriverGetVersion that loads the image. */
static const char kvli_cu_image_hash[] = "%(hash)s";
static const int kvli_cu_image_min_driver = %(driver)d;
static const uint32_t kvli_cu_image_bytes = %(size)du;
static const char *const kvli_cu_image[] = {
%(chunks)s
0};

#endif
"""


def header_text(kit, image):
    text = encode(image)
    chunks = "\n".join('"%s",' % text[i:i + CHUNK] for i in range(0, len(text), CHUNK))
    archs = ", ".join("sm_" + a for a in kit.archs)
    return TEXT % {"version": kit.version, "archs": archs, "ptx": PTX, "abi": read(SOURCES + "/abi.h"),
                   "hash": source_hash(), "sum": hashlib.sha256(image).hexdigest(), "driver": kit.release[0] * 1000, "size": len(image), "chunks": chunks}


def build(args):
    kit = Toolkit(args.nvcc)
    for arch in set(ARCHS) - set(kit.archs):
        print("kernels.py: nvcc %s does not know sm_%s: left out" % (kit.version, arch))
    reports = compile_all(kit, args.work, args.jobs)
    image = link(kit, args.work, reports)
    text = header_text(kit, image)
    if not os.path.exists(args.output) or read(args.output) != text:
        with open(args.output, "w", encoding="utf-8", newline="\n") as f:
            f.write(text)
    if unpack(args.output) != image:
        fail("what was written does not decode to the image")
    print("%s: image %d bytes, text %d bytes" % (args.output, len(image), len(text)))


def check(args):
    if not os.path.exists(args.header):
        fail("%s is not there: make kernels writes it (needs nvcc)" % args.header)
    text = read(args.header)
    if constant(text, "kvli_cu_image_hash") != source_hash():
        fail("%s was made from other sources than those in %s/: run `make kernels` (needs nvcc) and commit it" %
             (args.header, SOURCES))
    if read(SOURCES + "/abi.h") not in text:
        fail("%s does not hold the text of abi.h: run `make kernels`" % args.header)
    image = unpack(args.header)
    if "SHA-256 of the fatbin: %s " % hashlib.sha256(image).hexdigest() not in text:
        fail("%s: its image is damaged: run `make kernels`" % args.header)
    print("%s is current: image %d bytes, text %d bytes" % (args.header, len(image), len(text)))


def write_ptx(args):
    kit = Toolkit(args.nvcc)
    os.makedirs(args.folder, exist_ok=True)
    for arch in args.archs.split(","):
        paths = []
        for name in (n for n in source_files() if n.endswith(".cu")):
            compile_one(kit, name, "compute_" + arch, args.work)
            paths.append(object_path(args.work, name, "compute_" + arch))
        with open("%s/kernels_%s.ptx" % (args.folder, arch), "w", encoding="utf-8") as f:
            f.write(join_ptx(paths))


def main():
    os.chdir(ROOT)
    parser = argparse.ArgumentParser(usage=__doc__.split("usage: ")[1].split("\n\n")[0])
    commands = parser.add_subparsers(required=True)

    def command(name, run, **options):
        p = commands.add_parser(name)
        p.set_defaults(run=run)
        p.add_argument("--nvcc", default="nvcc")
        p.add_argument("--work", default="build/kernels")
        p.add_argument("-j", "--jobs", type=int, default=os.cpu_count())
        return p

    command("build", build).add_argument("-o", "--output", default=HEADER)
    command("check", check).add_argument("header", nargs="?", default=HEADER)
    p = command("unpack", lambda args: open(args.file, "wb").write(unpack(args.header)))
    p.add_argument("header")
    p.add_argument("file")
    p = command("ptx", write_ptx)
    p.add_argument("archs")
    p.add_argument("folder")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
