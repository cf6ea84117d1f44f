"""The GPU part of BENCHMARKS.md, from results/gpu_check.json (tools/gpu_check.sh) and results/cuda-static.json
(tools/kernel_figures.py)."""

from statistics import median

# A preset's share of the read ceiling, for decode over this many tokens in all or more.
SHARES = {"f16": 0.90, "fp8": 0.85, "int8": 0.85, "int4": 0.80, "nvfp4": 0.65}
LARGE = 10**6
TIMES_DECODE, TIMES_PREFILL, TFLOPS, LAYER_US, LAYER_LAUNCHES, STEP_US = 1.1, 1.0, 300, 12, 2, 60


def targets():
    """(name, what must be reached, in words); the names are those that figures() gives values to."""
    rows = [(f"decode {p}", f"decode attention, {p}, at 1M tokens and more", f"≥ {100 * s:.0f}% of the read ceiling")
            for p, s in SHARES.items()]
    return rows + [
        ("times decode", "decode beside FlashInfer, its better kernel, F16 and FP8", f"≥ {TIMES_DECODE}×"),
        ("times prefill", "prefill beside FlashInfer's FA2, paged, F16", f"≥ {TIMES_PREFILL:.0f}×"),
        ("tflops", "prefill attention, F16, the best case", f"≥ {TFLOPS} TFLOP/s"),
        ("layer", "a layer's call outside a graph", f"≤ {LAYER_LAUNCHES} launches or ≤ {LAYER_US} µs of the host"),
        ("step", "a step of 256 sequences planned and uploaded", f"≤ {STEP_US} µs")]


class Check:
    def __init__(self, result):
        self.result = result
        self.rows = result["rows"]
        self.device = result["device"] or {}

    def of(self, section, **wanted):
        return [r for r in self.rows if r["section"] == section and all(r.get(k) == v for k, v in wanted.items())]

    def peer_times(self, what, section, presets):
        """The peer's time over kvlite's for each shape that both ran."""
        times = []
        for row in self.of(what):
            if row["preset"] not in presets:
                continue
            same = {k: row[k] for k in ("preset", "batch", "context", "gqa")}
            peer = [p["us"] for p in self.of(section, what=what, **same) if p["rows"] == row.get("rows", 1)]
            if peer:
                times.append(min(peer) / row["us"])
        return times

    def figures(self):
        """name: (in words, met) of each target that has a figure"""
        found = {}
        for preset, least in SHARES.items():
            shares = [r["share"] for r in self.of("decode", preset=preset) if "share" in r and r["batch"] * (r["context"] + 16) >= LARGE]
            if shares:
                found[f"decode {preset}"] = (f"{100 * median(shares):.1f}% (least {100 * min(shares):.1f}%)", median(shares) >= least)
        for name, what, presets, least in (("times decode", "decode", ("f16", "fp8"), TIMES_DECODE), ("times prefill", "prefill", ("f16",), TIMES_PREFILL)):
            times = self.peer_times(what, "flashinfer", presets)
            if times:
                found[name] = (f"{median(times):.2f}× ({min(times):.2f}–{max(times):.2f})", median(times) >= least)
        rates = [r["tflop_s"] for r in self.of("prefill", preset="f16")]
        if rates:
            found["tflops"] = (f"{max(rates):.0f} TFLOP/s", max(rates) >= TFLOPS)
        host = {r["what"]: r for r in self.of("host")}
        layer, nodes = host.get("a layer's call, enqueued"), host.get("nodes of a layer in a captured graph")
        if layer and nodes:
            found["layer"] = (f"{nodes['count']:.1f} launches, {layer['us']:.1f} µs", nodes["count"] <= LAYER_LAUNCHES or layer["us"] <= LAYER_US)
        step = host.get("plan and upload of a step of 256 sequences")
        if step:
            found["step"] = (f"{step['us']:.1f} µs", step["us"] <= STEP_US)
        return found


def tokens(n):
    n = (n + 31) // 32 * 32
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


def describe(check):
    d, m = check.device, check.result["machine"]
    parts = [f"{d['name']}: {d['sms']} multiprocessors, compute capability {d['capability']}, {d['memory_bytes'] / 2**30:.0f} GiB, "
             f"{d['l2_bytes'] / 2**20:.0f} MiB L2; driver for CUDA {d['driver'] // 1000}.{d['driver'] % 1000 // 10}"]
    if "sm_mhz_most" in m:
        parts.append(f"while it was measured: multiprocessors at {m['sm_mhz_least']}–{m['sm_mhz_most']} MHz, memory at {m['memory_mhz']} MHz, "
                     f"at most {m['celsius_most']} °C and {m['watts_most']} W")
    return "; ".join(parts) + "."


def decode_table(page, table, check):
    presets = [p for p in ("f16", "bf16", "int8", "int8+", "fp8", "balanced", "int4", "nvfp4") if check.of("decode", preset=p)]
    shapes = sorted({(r["gqa"], r["batch"], r["context"]) for r in check.of("decode")})

    def cell(gqa, batch, context, preset):
        found = check.of("decode", preset=preset, gqa=gqa, batch=batch, context=context)
        return f"{found[0]['us']:,.0f} ({100 * found[0].get('share', 0):.0f}%)" if found else ""

    page.add("### Decode\n", "µs of a layer, with the append and the merge (share of the ceiling).\n",
             table(["GQA", "batch", "context", *presets], [[g, b, tokens(c), *(cell(g, b, c, p) for p in presets)] for g, b, c in shapes]))


def peer_table(page, table, check):
    rows = []
    for row in check.of("decode") + check.of("prefill"):
        what, n = row["section"], row.get("rows", 1)
        for section in ("flashinfer", "torch"):
            same = {k: row[k] for k in ("preset", "batch", "context", "gqa")}
            rows += [[what, row["preset"], row["gqa"], row["batch"], tokens(row["context"]), n, f"{row['us']:,.0f}",
                      f"{section} {p['kernel']}", f"{p['us']:,.0f}", f"{p['us'] / row['us']:.2f}×"]
                     for p in check.of(section, what=what, rows=n, **same)]
    if rows:
        page.add("### Beside FlashInfer and PyTorch\n", "The same shapes in the same run. kvlite's times have the append and the seal in them, "
                 "the others' have not.\n",
                 table(["", "KV", "GQA", "batch", "context", "rows", "kvlite, µs", "peer", "µs", "peer's time over kvlite's"], rows))


def other_tables(page, table, check):
    prefill = check.of("prefill")
    if prefill:
        page.add("### Prefill\n", table(["KV", "batch", "context", "rows", "µs", "TFLOP/s"],
                                        [[r["preset"], r["batch"], tokens(r["context"]), r["rows"], f"{r['us']:,.0f}", f"{r['tflop_s']:.0f}"]
                                         for r in prefill]))
    moved = [[f"store and seal, {r['preset']}", r] for r in check.of("store")] + [[f"copy, {r['what']}", r] for r in check.of("copies")]
    if moved:
        page.add("### Store, seal and copies\n", table(["", "GB/s", "of the ceiling"],
                                                       [[what, f"{r['gb_s']:,.0f}", f"{100 * r['share']:.0f}%" if "share" in r else ""]
                                                        for what, r in moved]))
    host = check.of("host")
    if host:
        page.add("### The host's part\n", table(["", "µs or count", "target"], [
            [r["what"], f"{r.get('us', r.get('count')):.1f}", f"{r['target']:g}" if "target" in r else ""] for r in host]))


def parts_table(page, table, check):
    page.add("### Checks\n", table(["", "", "seconds", ""], [[p["part"], p["status"], p["seconds"], p["note"]] for p in check.result["parts"]]))


def static_table(page, table, static):
    """What is known of each kernel without a device, of those for D 128 (the file has all)."""
    rows = []
    for k in static["kernels"]:
        device = static["devices"].get(k["arch"].removeprefix("sm_"))
        if not device or "blocks_per_sm" not in k or ("_d" in k["kernel"] and "_d128" not in k["kernel"]):
            continue
        by_issue = k.get("gbs_by_issue")
        bound = max(1 / device["gbs"], 1 / by_issue) * 1e3 if by_issue else None
        rows.append([f"`{k['kernel']}`", device["name"], k["registers"], f"{k['shared'] / 1024:.1f}", k["blocks_per_sm"],
                     f"{100 * k['blocks_per_sm'] * k['threads'] / device['threads']:.0f}%", k.get("instructions", ""), k.get("loop", ""),
                     f"{k['instructions_per_kv_byte']:.3f}" if by_issue else "", f"{by_issue:,}" if by_issue else "",
                     f"{bound:.2f} ({'issue' if by_issue < device['gbs'] else 'memory'})" if by_issue else ""])
    devices = "; ".join(f"{d['name']}: {d['sms']} multiprocessors at {d['ghz']} GHz, {d['gbs']:,} GB/s" for d in static["devices"].values())
    page.add("### Each kernel, without a device\n",
             "From what the compiler wrote (`tools/kernel_figures.py`), for D 128. A decode kernel's loop is the fewest instructions that a warp "
             "issues for 16 tokens; with what a multiprocessor can issue that bounds the rate, and so does the memory; the time for 1 GB "
             f"of KV is by the tighter of the two. {devices}.\n",
             table(["kernel", "device", "registers", "shared, KiB", "blocks a multiprocessor", "occupancy", "instructions", "loop",
                    "a KV byte", "GB/s by issue", "ms for 1 GB (bound by)"], rows))


def section(page, table, result, static):
    """Adds the part; returns (what, measured, target, met) for the page's first table."""
    check = Check(result) if result and not result["mock"] else None
    page.add("## CUDA on a GPU\n", "    tools/gpu_check.sh\n\n")
    figures = check.figures() if check else {}
    if check:
        ceiling = check.of("ceiling")
        page.add(describe(check), "", f"Read ceiling, a kernel that does nothing else: {ceiling[0]['gb_s']:,.0f} GB/s. KV heads 8, D 128, blocks of "
                 "32 tokens, q, k, v and out in F16 on the device, layers replayed as a graph, more KV in turn than the L2 cache holds; "
                 "bytes count scales.\n" if ceiling else "")
    else:
        page.add("*Not measured yet: no GPU was at hand when this page was written. Owed, for an H200:*\n")
    page.add(table(["", "target", "measured", ""],
                   [[what, target, figures[name][0] if name in figures else "owed", ("yes" if figures[name][1] else "**no**") if name in figures else ""]
                    for name, what, target in targets()]))
    if check:
        parts_table(page, table, check)
        decode_table(page, table, check)
        other_tables(page, table, check)
        peer_table(page, table, check)
        left = check.of("left_out")
        if left:
            page.add("Left out: " + "; ".join(f"{r['case']}: {r['why']}" for r in left) + ".")
    if static:
        static_table(page, table, static["result"])
    return [(f"{what} ({check.device['name']})", figures[name][0], target, figures[name][1]) for name, what, target in targets() if name in figures]
