"""The Vulkan part of BENCHMARKS.md, from results/bench-vulkan.json (build/bench_vulkan), the rows "vulkan ..." of
results/gpu_check.json (tools/gpu_check.sh), and results/vulkan-static.json (tools/vulkan_figures.py)."""

from statistics import median

import gpu

# On a GPU: a preset's share of the read ceiling, for decode over this many tokens in all or more.
SHARES = {"f16": 0.70, "int4": 0.60}
LARGE = 10**6
# On lavapipe: time over that of ggml's Vulkan backend; a packed preset's over that of F16.
OF_GGML, OF_F16 = 0.3, 1.0
PRESETS = "f16", "bf16", "int8+", "int8", "fp8", "balanced", "int4", "nvfp4"


class Rows:
    def __init__(self, rows, prefix=""):
        self.rows = rows
        self.prefix = prefix

    def of(self, section, **wanted):
        return [r for r in self.rows if r["section"] == self.prefix + section and all(r.get(k) == v for k, v in wanted.items())]

    def device(self):
        return (self.of("device") or [None])[0]


def size(row):
    return gpu.tokens(row["context"])


def cpu_goals(rows):
    """(what, measured, target, met) of a run on lavapipe"""
    found = []
    for row in rows.of("decode", preset="f16"):
        if "of_ggml" in row:
            found.append((f"decode attention through lavapipe, F16, {row['context'] + 16:,} tokens, of the time of ggml's Vulkan backend",
                          f"{row['of_ggml']:.2f}×", f"≤ {OF_GGML}×", row["of_ggml"] <= OF_GGML))
    packed = [r for r in rows.of("decode") if r["preset"] not in ("f16", "bf16") and "of_f16" in r and "of_ggml" in
              next((f for f in rows.of("decode", preset="f16", context=r["context"], dim=r["dim"], batch=r["batch"])), {})]
    if packed:
        worst = max(packed, key=lambda r: r["of_f16"])
        found.append((f"the packed presets there, of F16's time, the worst ({worst['preset']}, {worst['context'] + 16:,} tokens)",
                      f"{worst['of_f16']:.2f}×", f"≤ {OF_F16:.0f}×", worst["of_f16"] <= OF_F16))
    return found


def gpu_goals(rows):
    found = []
    for preset, least in SHARES.items():
        shares = [r["share"] for r in rows.of("decode", preset=preset) if "share" in r and r["batch"] * (r["context"] + 16) >= LARGE]
        measured = f"{100 * median(shares):.1f}% (least {100 * min(shares):.1f}%)" if shares else None
        found.append((f"decode attention through Vulkan, {preset}, at 1M tokens and more", measured, f"≥ {100 * least:.0f}% of the read ceiling",
                      bool(shares) and median(shares) >= least))
    return found


def decode_table(page, table, rows):
    presets = [p for p in PRESETS if rows.of("decode", preset=p)]
    shapes = sorted({(r["dim"], r["gqa"], r["batch"], r["context"]) for r in rows.of("decode")}, key=lambda s: (-s[0], s[1:]))

    def cell(dim, gqa, batch, context, preset):
        found = rows.of("decode", preset=preset, dim=dim, gqa=gqa, batch=batch, context=context)
        if not found:
            return ""
        r = found[0]
        notes = [f"{100 * r['share']:.0f}%"] if "share" in r else []
        if preset != "f16" and "of_f16" in r:
            notes.append(f"{r['of_f16']:.2f}×")
        return f"{r['us']:,.0f}" + (f" ({', '.join(notes)})" if notes else "")

    page.add("### Decode\n", "µs of a layer, with the append and the merge (share of the read ceiling, time over that of F16).\n",
             table(["D", "GQA", "batch", "context", *presets], [[d, g, b, gpu.tokens(c), *(cell(d, g, b, c, p) for p in presets)]
                                                                for d, g, b, c in shapes]))
    beside = [r for r in rows.of("decode") if "of_ggml" in r]
    if beside:
        page.add("Beside ggml's Vulkan backend (0.21, FLASH_ATTN_EXT, without append; measured on this driver and kind of machine, 2 cores, but in "
                 "another run):\n",
                 table(["KV", "context", "µs", "ggml's, µs", "of ggml's time"],
                       [[r["preset"], size(r), f"{r['us']:,.0f}", f"{r['ggml_us']:,.0f}", f"{r['of_ggml']:.2f}×"] for r in beside]))


def other_tables(page, table, rows):
    prefill = rows.of("prefill")
    if prefill:
        page.add("### Prefill\n", table(["KV", "batch", "context", "rows", "µs", "GFLOP/s", "of F16's time"],
                                        [[r["preset"], r["batch"], size(r), r["rows"], f"{r['us']:,.0f}", f"{1000 * r['tflop_s']:,.1f}",
                                          f"{r['of_f16']:.2f}×" if "of_f16" in r else ""] for r in prefill]))
    moved = [[f"store and seal, {r['preset']}", r] for r in rows.of("store")] + [[f"copy, {r['what']}", r] for r in rows.of("copies")]
    if moved:
        page.add("### Store, seal and copies\n", table(["", "GB/s", "of the read ceiling"],
                                                       [[what, f"{r['gb_s']:,.2f}", f"{100 * r['share']:.0f}%" if "share" in r else ""]
                                                        for what, r in moved]))
    host = rows.of("host")
    if host:
        page.add("### The host's part\n", table(["", "µs"], [[r["what"], f"{r['us']:,.1f}"] for r in host]))


def show(page, table, rows):
    device, ceiling = rows.device(), rows.of("ceiling")
    page.add(f"{device['name']}, Vulkan {device['api']}, subgroups of {device['subgroup']}. 8 KV heads, blocks of 32 tokens, q, k, v and out in F16 "
             "on the device, a step's layers recorded once and submitted again; the least of several rounds; bytes count scales."
             + (f" Read ceiling, a shader that does nothing else: {ceiling[0]['gb_s']:,.1f} GB/s." if ceiling else "")
             + (" This driver runs on the CPU, and compiles a load of each lane by itself: its ceiling is far below the memory's, and what "
                "the processor's own cache holds is read from there." if device["cpu"] else ""))
    decode_table(page, table, rows)
    other_tables(page, table, rows)
    left = rows.of("left_out")
    if left:
        page.add("Left out: " + "; ".join(f"{r['case']}: {r['why']}" for r in left) + ".")


def static_table(page, table, static):
    """Of pipelines for D 128, as they are where a device has all that kvlite uses; the file has all."""
    rows = []
    for p in static["pipelines"]:
        device = static["devices"][p["family"]]
        if p["dim"] != 128 or (p["shader"] == "decode" and p["variant"] != 7):
            continue
        by_issue = p.get("gbs_by_issue")
        rows.append([f"{p['shader']}, {p['preset']}" if p["shader"] in ("decode", "prefill", "store") else p["shader"], device["name"], p["vgprs"],
                     p["spilled_vgprs"], f"{p['shared'] / 1024:.1f}", p["waves_per_simd"], p["instructions"], p.get("loop", ""),
                     f"{p['instructions_per_kv_byte']:.3f}" if by_issue else "", f"{by_issue:,}" if by_issue else "",
                     f"{100 * device['gbs'] / by_issue:.0f}%" if by_issue else ""])
    devices = "; ".join(f"{d['name']}: {d['cus']} compute units at {d['ghz']} GHz, {d['gbs']:,} GB/s" for d in static["devices"].values())
    page.add("### Each shader on AMD, without a device\n",
             "What Mesa's RADV compiles for a GPU that is not there (`tools/vulkan_figures.py`), for D 128, GQA 4, all variants' features on. A decode "
             "shader's loop is all that stands in its loop over packed blocks, rare ways included: so many instructions of a wave at the most for "
             f"its KV bytes. The vector ones among them bound the rate; the last column is what reading at full bandwidth would take of that. {devices}.\n",
             table(["shader", "device", "VGPRs", "spilled", "LDS, KiB", "waves a SIMD", "instructions", "loop", "a KV byte", "GB/s by issue",
                    "of issue"], rows))


def section(page, table, bench, check, static):
    """Adds the part; returns rows for the page's first table."""
    rows = Rows(bench["rows"]) if bench else None
    on_gpu = Rows(check["rows"], "vulkan ") if check and not check["mock"] else None
    if on_gpu and not on_gpu.device():
        on_gpu = None
    page.add("## Vulkan\n", "    build/bench_vulkan\n\n")
    goals = []
    if rows:
        show(page, table, rows)
        goals += cpu_goals(rows) if rows.device()["cpu"] else gpu_goals(rows)
    else:
        page.add("*Not measured yet.*\n")
    targets = gpu_goals(on_gpu or Rows([]))
    page.add("### On a GPU\n", "" if on_gpu else "*Not measured yet: no GPU was at hand when this page was written. Owed, for an H200:*\n",
             table(["", "target", "measured", ""],
                   [[what, target, measured or "owed", ("yes" if met else "**no**") if measured else ""] for what, measured, target, met in targets]))
    if on_gpu:
        show(page, table, on_gpu)
    if static:
        static_table(page, table, static["result"])
    return [g for g in goals if g[1]] + [(f"{what} ({on_gpu.device()['name']})", measured, target, met)
                                        for what, measured, target, met in targets if measured]
