#!/usr/bin/env python3
"""What can be known about the Vulkan shaders on AMD GPUs without one: Mesa's RADV compiles for a device that is not there.

usage: vulkan_figures.py [--families LIST] [--source HEADER] [--asm FOLDER] [-o JSON] [NAME...]

Registers, spills, occupancy and instructions of each pipeline; for decode those of its main loop a KV byte, hence the rate that issuing
them bounds. NAME: only lines with all of them, such as `decode int4`. --asm writes each pipeline's assembly as a file. Needs a C
compiler, libvulkan-dev and mesa-vulkan-drivers (radeon_icd).
"""
import argparse
import glob
import json
import math
import os
import re
import subprocess
import tempfile

import shaders
from kernel_sources import ROOT, fail

# RADV's name: the card; compute units, GHz (boost), GB/s. A compute unit issues a wave's vector instruction of 64 lanes
# in two clocks on each of two SIMDs (RDNA), in four on each of four (GCN): one a clock either way.
FAMILIES = {
    "navi21": {"name": "RX 6800 XT", "cus": 72, "ghz": 2.25, "gbs": 512},
    "gfx1100": {"name": "RX 7900 XTX", "cus": 96, "ghz": 2.5, "gbs": 960},
    "vega10": {"name": "RX Vega 64", "cus": 64, "ghz": 1.55, "gbs": 484},
}
PRESETS = "f16", "int8", "int8+", "fp8", "balanced", "int4", "nvfp4"
STATS = {"VGPRs": "vgprs", "SGPRs": "sgprs", "Spilled VGPRs": "spilled_vgprs", "Spilled SGPRs": "spilled_sgprs", "LDS size": "shared",
         "Scratch size": "scratch", "Subgroups per SIMD": "waves_per_simd", "Instructions": "instructions", "Code size": "code_bytes",
         "subgroup": "subgroup"}


def icd():
    for folder in ("/usr/share/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/etc/vulkan/icd.d"):
        for path in glob.glob(folder + "/radeon_icd*.json"):
            return path
    fail("RADV is not there (Debian: mesa-vulkan-drivers)")
    return None


def jobs(names):
    """Lines for vulkan_figures.c: what a GPU with subgroups of 64 gets."""
    lines = []
    for dim in (128, 64):
        for preset in PRESETS:
            lines += ["decode %d %s %d 4" % (variant, preset, dim) for variant in (7, 3, 0)]
            lines.append("prefill 3 %s %d 4" % (preset, dim))
            lines.append("store 2 %s %d 4" % (preset, dim))
    lines += ["merge 2 f16 128 4", "copy 0 f16 128 4", "read 0 f16 128 4"]
    return [line for line in lines if all(n in line for n in names)]


def compile_all(family, program, folder, lines):
    """[({field: value}, [assembly])] of the pipelines."""
    env = dict(os.environ, RADV_FORCE_FAMILY=family, VK_ICD_FILENAMES=icd(), VK_DRIVER_FILES=icd(), MESA_SHADER_CACHE_DISABLE="true")
    done = subprocess.run([program, folder], input="\n".join(lines), capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        fail("%s: %s" % (family, done.stderr.strip() or "status %d" % done.returncode))
    found = []
    for line in done.stdout.splitlines():
        kind, rest = line.split(" ", 1)
        if kind == "pipeline":
            fields = dict(f.split("=") for f in rest.split())
            found.append(({k: int(v) if v.isdigit() else v for k, v in fields.items()}, []))
        elif kind == "stat":
            name, value = rest.rsplit(": ", 1)
            if name in STATS:
                found[-1][0][STATS[name]] = int(value)
        else:
            found[-1][1].append(rest.split(";")[0].strip())
    return found


# ---- instructions ----

LOAD = re.compile(r"(?:buffer|global)_load_(dword(?:x([234]))?|ushort|ubyte|u8|u16|b(\d+))\b")


def is_instruction(text):
    return not text.endswith(":")


def bytes_of(text):
    """That one lane loads."""
    found = LOAD.match(text)
    if not found:
        return 0
    kind, words, bits = found.groups()
    if bits:
        return int(bits) // 8
    return {"ushort": 2, "u16": 2, "ubyte": 1, "u8": 1}.get(kind) or 4 * int(words or 1)


def loops(code):
    """(first line, last line) of each: from the target of a branch backwards to that branch."""
    labels = {t[:-1]: i for i, t in enumerate(code) if t.endswith(":")}
    for i, text in enumerate(code):
        found = re.match(r"s_c?branch\S*\s+(BB\d+)$", text)
        if found and labels.get(found.group(1), i + 1) <= i:
            yield labels[found.group(1)], i


FMA = re.compile(r"v_(?:pk_)?(?:fma|mac|mad|dot)")


def inside(a, b):
    return b[0] <= a[0] and a[1] <= b[1] and a != b


def decode_loop(code, record):
    """Adds to a decode pipeline's record what its loop over packed blocks takes: the first of the innermost loops with the
    products of scores and sums in them, with the loops around it that have nothing else in them. All that stands in it
    counts, rare ways too, so that this is the most."""
    per_token = 2 * record["rows"] * record["dim"] / record["lanes"]  # products of one lane

    def products(loop):
        return sum(1 + t.startswith("v_pk_") for t in code[loop[0]:loop[1] + 1] if FMA.match(t))

    every = list(loops(code))
    with_products = [a for a in every if products(a) >= per_token / 2]
    innermost = sorted(a for a in with_products if not any(inside(b, a) for b in with_products))
    if not innermost:
        return
    main = innermost[0]
    chain = [b for b in every if inside(main, b)]
    for around in sorted(chain, key=lambda b: b[1] - b[0]):
        if all(b in chain or b == innermost[0] or inside(b, innermost[0]) for b in every if inside(b, around)):
            main = around
    body = [t for t in code[main[0]:main[1] + 1] if is_instruction(t)]
    waves, slots = -(-record["workgroup"] // record["subgroup"]), record["workgroup"] // record["lanes"]
    tokens = slots * 2 ** round(math.log2(products(main) / per_token))  # (decoding has some products, too)
    kv = record["tile_bytes"] * tokens / record["block_tokens"]
    vector = sum(t.startswith("v_") for t in body)
    record.update(loop=len(body), loop_vector=vector, loop_tokens=tokens, loop_bytes=round(kv),
                  instructions_per_kv_byte=round(len(body) * waves / kv, 4), vector_per_kv_byte=round(vector * waves / kv, 4))
    device = FAMILIES[record["family"]]
    record["gbs_by_issue"] = round(device["cus"] * device["ghz"] / record["vector_per_kv_byte"])


# ---- all of it ----

def collect(args):
    records = []
    with tempfile.TemporaryDirectory() as folder:
        program = os.path.join(folder, "vulkan_figures")
        subprocess.run(["cc", "tools/vulkan_figures.c", "-o", program, "-lvulkan"], check=True)
        shaders.write_parts(argparse.Namespace(header=args.source, folder=folder))
        there = {os.path.basename(p)[:-4] for p in glob.glob(folder + "/*.spv")}
        lines = [line for line in jobs(args.names) if "%s.%s" % tuple(line.split()[:2]) in there]
        for family in args.families.split(","):
            for record, code in compile_all(family, program, folder, lines):
                record["family"] = family
                if record["shader"] == "decode":
                    decode_loop(code, record)
                if args.asm:
                    os.makedirs(args.asm, exist_ok=True)
                    name = "%s-%s-%s-%s-%s.s" % (family, record["shader"], record["variant"], record["preset"], record["dim"])
                    with open(os.path.join(args.asm, name), "w", encoding="utf-8") as f:
                        f.write("\n".join(code) + "\n")
                records.append(record)
    return records


def table(records):
    head = ("family", "shader", "variant", "preset", "dim", "vgprs", "spilled_vgprs", "scratch", "shared", "waves_per_simd", "instructions",
            "loop", "loop_tokens", "instructions_per_kv_byte", "vector_per_kv_byte", "gbs_by_issue")
    print(" ".join("%-9s" % h[:9] for h in head))
    for r in records:
        print(" ".join("%-9s" % r.get(h, "-") for h in head))


def main():
    os.chdir(ROOT)
    parser = argparse.ArgumentParser(usage=__doc__.split("usage: ")[1].split("\n\n")[0])
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--source", default=shaders.HEADER)
    parser.add_argument("--asm")
    parser.add_argument("-o", "--output", default="tools/report/results/vulkan-static.json")
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    records = collect(args)
    table(records)
    with open(args.output, "w", encoding="utf-8") as f:
        json.dump({"name": "vulkan-static", "command": "tools/vulkan_figures.py", "quick": False,
                   "result": {"bench": "vulkan-static", "devices": FAMILIES, "sources": shaders.source_hash(), "pipelines": records}}, f,
                  indent=1, sort_keys=True)
        f.write("\n")


if __name__ == "__main__":
    main()
