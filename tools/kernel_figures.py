#!/usr/bin/env python3
"""What can be known about the CUDA kernels without a device, from what `make kernels` left in build/kernels.

usage: kernel_figures.py [--work FOLDER] [--bin FOLDER] [-o JSON] [NAME...]     NAME: only kernels with it in their names

Registers, stack and shared memory of each kernel and architecture; how many blocks fit a multiprocessor; and for decode
the instructions of a warp's main loop for 16 tokens, hence the time that issuing them bounds. Needs a C compiler, and
cuobjdump and nvdisasm (--bin; the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm have them).
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

import kernels

# multiprocessors, GHz, GB/s; per multiprocessor: registers, threads, blocks, KB of shared memory, of which a block can have
DEVICES = {
    "89": {"name": "RTX 4090", "sms": 128, "ghz": 2.52, "gbs": 1008, "threads": 1536, "blocks": 24, "shared": 100, "block_shared": 99},
    "90": {"name": "H200", "sms": 132, "ghz": 1.755, "gbs": 4800, "threads": 2048, "blocks": 32, "shared": 228, "block_shared": 227},
}
REGISTERS, ISSUED = 65536, 4  # of a multiprocessor; warp instructions a clock
THREADS = {"kvl_store": "KVLI_CU_STORE_THREADS", "kvl_decode": "32 * KVLI_CU_DECODE_WARPS", "kvl_prefill": "32 * KVLI_CU_PREFILL_WARPS",
           "kvl_plain": "KVLI_CU_PLAIN_THREADS", "kvl_merge": "KVLI_CU_MERGE_THREADS", "kvl_copy": "KVLI_CU_COPY_THREADS",
           "kvl_copy_rows": "KVLI_CU_COPY_THREADS", "kvl_read": "KVLI_CU_COPY_THREADS"}
FORMATS = {"f16": ("F16", "F16"), "bf16": ("BF16", "BF16"), "int8": ("INT8", "INT8"), "int8c": ("INT8_CHANNEL", "INT8"),
           "fp8": ("FP8_E4M3", "FP8_E4M3"), "nvfp4": ("NVFP4", "NVFP4"), "balanced": ("INT8", "INT4"), "int4": ("INT4_CHANNEL", "INT4")}


def parse(kernel):
    """(family, preset, dim, rows) of a kernel's name."""
    found = re.fullmatch(r"(kvl_[a-z]+)_([a-z0-9]+)_d(\d+)(?:_n(\d+))?", kernel)
    if not found:
        return kernel, None, 0, 0
    family, preset, dim, rows = found.groups()
    return family, preset, int(dim), int(rows or 0)


def shapes(names):
    """{kernel: (threads, [shared memory by stages 1..4], bytes of a unit)}, as abi.h says."""
    lines = []
    for name in names:
        family, preset, dim, rows = parse(name)
        smem = ["0"] * 4
        unit = "0"
        if family == "kvl_store":
            smem = ["KVLI_CU_STORE_SMEM"] * 4
        elif family == "kvl_plain":
            smem = ["kvli_cu_plain_smem(128)"] * 4
        elif family == "kvl_prefill":
            smem = ["kvli_cu_prefill_smem(%d)" % dim] * 4
        elif family == "kvl_decode":
            k, v = ("KVLI_CU_" + f for f in FORMATS[preset])
            smem = ["kvli_cu_decode_smem(%s, %s, %d, %d, %d)" % (k, v, dim, s, rows) for s in (1, 2, 3, 4)]
            unit = " + ".join("KVLI_CU_UNIT * (kvli_gpu_row_bytes(%s, %d) + kvli_gpu_token_scale_bytes(%s, %d))" % (f, dim, f, dim)
                              for f in (k, v)) + " + kvli_gpu_channel_scale_bytes(%s, %d) / 2" % (k, dim)  # of a block of 32 tokens
        lines.append('    printf("%s %%d %%d %%d %%d %%d %%d\\n", %s);' %
                     (name, ", ".join("(int)(%s)" % x for x in [THREADS[family], *smem, unit])))
    with tempfile.TemporaryDirectory() as folder:
        source, program = os.path.join(folder, "a.c"), os.path.join(folder, "a")
        with open(source, "w", encoding="utf-8") as f:
            f.write('#include "abi.h"\n#include <stdio.h>\nint main(void) {\n%s\n    return 0;\n}\n' % "\n".join(lines))
        subprocess.run(["cc", "-I", kernels.SOURCES, source, "-o", program], check=True)
        out = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    result = {}
    for line in out.splitlines():
        name, *numbers = line.split()
        threads, *smem, unit = map(int, numbers)
        result[name] = threads, smem, unit
    return result


def blocks_per_sm(device, threads, registers, shared):
    warps = (threads + 31) // 32
    by_registers = REGISTERS // (warps * ((registers * 32 + 255) // 256 * 256))
    by_shared = device["shared"] * 1024 // (shared + 1024)
    return min(by_registers, by_shared, device["threads"] // threads, device["blocks"])


def stages_on(device, smem):
    """How the host chooses: as deep as lets two blocks run, else as fits."""
    for limit, blocks in ((device["shared"], 2), (device["block_shared"], 1)):
        for stages in (4, 3, 2):
            if blocks * (smem[stages - 1] + (1024 if blocks > 1 else 0)) <= limit * 1024:
                return stages
    return 1


# ---- instructions ----

def instructions(path, tools):
    """{kernel: [(address, text)]}"""
    env = dict(os.environ, PATH=tools + os.pathsep + os.environ["PATH"])
    cuobjdump = shutil.which("cuobjdump", path=env["PATH"])
    if not cuobjdump:
        return {}
    out = subprocess.run([cuobjdump, "-sass", path], capture_output=True, text=True, env=env, check=True).stdout
    result, name = {}, None
    for line in out.splitlines():
        if found := re.match(r"\s+Function : (\S+)", line):
            name = found.group(1)
            result[name] = []
        elif name and (found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line)):
            result[name].append((int(found.group(1), 16), found.group(2)))
    return result


def target_of(text):
    found = re.search(r"\b(?:BRA|CALL\.REL)\S*\s.*?\b0x([0-9a-f]+)\s*$", text)
    return int(found.group(1), 16) if found else None


# Loads through generic addresses: exact units, which packed formats read straight from device memory.
EXACT = re.compile(r"\bLD\.E\b")
COPY = re.compile(r"UBLKCP|LDGSTS")


def shortest(code, begin, end, mmas):
    """The fewest instructions from begin to end, forwards, with so many mma and a copy begun: a turn with a unit of packed
    rows. What an unlikely case needs (rescaling, a mask) is passed by. None: no such way."""
    copies = any(COPY.search(t) for a, t in code if begin <= a <= end)  # of a later unit, under way meanwhile
    best = {begin: {(0, not copies): 0}}  # address: {(mma, has it copied): instructions}
    addresses = [a for a, _ in code]
    after = dict(zip(addresses, addresses[1:]))
    for address, text in code:
        if address not in best or address > end:
            continue
        mma, copy = "HMMA" in text, bool(COPY.search(text))
        ways = {(n + mma, c or copy): steps + 1 for (n, c), steps in best.pop(address).items() if n + mma <= mmas}
        if address == end:
            return ways.get((mmas, True))
        if EXACT.search(text):
            continue
        goes_on = not re.fullmatch(r"BRA 0x[0-9a-f]+ *|(EXIT|RET)\b.*", text)  # without a predicate: it never goes on
        for to in ([after.get(address)] if goes_on else []) + [target_of(text)]:
            if to is not None and address < to <= end:
                known = best.setdefault(to, {})
                for way, steps in ways.items():
                    known[way] = min(known.get(way, steps), steps)
    return None


def main_loop(code, mmas):
    """(fewest instructions of a turn, all that stand in it) of the loop with a unit's mma."""
    found = []
    for address, text in code:
        begin = target_of(text)
        if begin is None or begin > address:
            continue
        whole = [t for a, t in code if begin <= a <= address]
        if sum("HMMA" in t for t in whole) < mmas:
            continue
        steps = shortest(code, begin, address, mmas)
        if steps:
            found.append((steps, len(whole)))
    return min(found) if found else None


# ---- all of it ----

def collect(args):
    records = []
    targets = [arch for arch, _ in kernels.ARCHS if os.path.exists(kernels.object_path(args.work, "kernels", "sm_" + arch))]
    reports = {}
    for arch in targets:
        report = kernels.read(kernels.object_path(args.work, "kernels", "sm_" + arch) + ".log")
        for kernel, stack, spill, registers, static in kernels.ptxas_report(report):
            if registers:
                reports[kernel, arch] = stack, spill, registers, static
    names = sorted({k for k, _ in reports if k.startswith("kvl_") and all(n in k for n in args.names)})
    shape = shapes(names)
    sass = {arch: instructions(kernels.object_path(args.work, "kernels", "sm_" + arch), args.bin) for arch in DEVICES if arch in targets}
    for kernel in names:
        family, _, dim, rows = parse(kernel)
        threads, smem, unit = shape[kernel]
        for arch in targets:
            if (kernel, arch) not in reports:
                continue
            stack, spill, registers, static = reports[kernel, arch]
            record = {"kernel": kernel, "arch": "sm_" + arch, "threads": threads, "registers": registers, "stack": stack,
                      "spilled": spill, "static_shared": static}
            if device := DEVICES.get(arch):
                stages = stages_on(device, smem) if family == "kvl_decode" else 1
                shared = static + smem[stages - 1]
                record.update(shared=shared, blocks_per_sm=blocks_per_sm(device, threads, registers, shared))
                code = sass[arch].get(kernel)
                if code:
                    record["instructions"] = len(code)
                loop = main_loop(code, dim // 8 * (rows // 8)) if code and family == "kvl_decode" else None
                if loop:
                    per_byte = loop[0] / unit
                    issue = device["sms"] * ISSUED * device["ghz"]  # 1e9 warp instructions a second
                    record.update(stages=stages, unit_bytes=unit, loop=loop[0], loop_with_all=loop[1],
                                  instructions_per_kv_byte=round(per_byte, 4), gbs_by_issue=round(issue / per_byte),
                                  issue_share_at_bandwidth=round(device["gbs"] * per_byte / issue, 3))
            records.append(record)
    return records


def table(records):
    print("%-28s %-8s %4s %7s %7s %6s %6s %8s %8s %9s" % ("kernel", "arch", "regs", "shared", "blocks", "loop", "all",
                                                          "per byte", "GB/s", "of issue"))
    for r in records:
        if "blocks_per_sm" in r:
            print("%-28s %-8s %4d %7d %7d %6s %6s %8s %8s %9s" % (
                r["kernel"], r["arch"], r["registers"], r["shared"], r["blocks_per_sm"], r.get("loop", "-"), r.get("loop_with_all", "-"),
                r.get("instructions_per_kv_byte", "-"), r.get("gbs_by_issue", "-"), r.get("issue_share_at_bandwidth", "-")))


def main():
    os.chdir(kernels.ROOT)
    parser = argparse.ArgumentParser(usage=__doc__.split("usage: ")[1].split("\n\n")[0])
    parser.add_argument("--work", default="build/kernels")
    parser.add_argument("--bin", default="/usr/local/cuda/bin")
    parser.add_argument("-o", "--output", default="tools/report/results/cuda-static.json")
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    if not os.path.isdir(args.work):
        sys.exit("kernel_figures.py: %s is not there: run `make kernels`" % args.work)
    records = collect(args)
    table(records)
    with open(args.output, "w", encoding="utf-8") as f:
        json.dump({"name": "cuda-static", "command": "tools/kernel_figures.py", "quick": False,
                   "result": {"bench": "cuda-static", "devices": DEVICES, "sources": kernels.source_hash(), "kernels": records}}, f,
                  indent=1, sort_keys=True)
        f.write("\n")


if __name__ == "__main__":
    main()
