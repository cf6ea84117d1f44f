#!/usr/bin/env python3
"""Writes BENCHMARKS.md and tools/report/plots/*.svg from tools/report/results/*.json: no figure has another source.

    page.py [--out FOLDER]        (default: the checkout)
"""

import argparse
import json
import os
import sys

import gpu
import plots
import style
import vulkan
from steps import STEPS

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
PLOTS = "tools/report/plots"


class Results:
    """The results files by name; result() is None where the measurement was skipped, failed or not made."""

    def __init__(self):
        self.records = {}
        for step in STEPS:
            try:
                with open(os.path.join(HERE, "results", step.name + ".json"), encoding="utf-8") as f:
                    self.records[step.name] = json.load(f)
            except FileNotFoundError:
                continue

    def get(self, name):
        return self.records.get(name, {}).get("result")

    def why_not(self, name):
        record = self.records.get(name, {})
        return record.get("skipped") or record.get("failed") or "not measured"

    def command(self, *names):
        lines = [self.records[n]["command"] for n in names if "command" in self.records.get(n, {})]
        return "".join(f"    {line}\n" for line in lines) + "\n" if lines else ""

    def machines(self):
        seen = []
        for record in self.records.values():
            text = machine_text(record["machine"])
            if "result" in record and text not in seen:
                seen.append(text)
        return seen


def machine_text(m):
    return (f"{m['cores']} cores of an {m['cpu']} ({m['simd']}, {m['l3']} L3), {m['memory_gib']} GiB, {m['system']}, "
            f"gcc {m['compiler']}")


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(c) for c in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def percent(x, digits=1):
    return f"{100 * x:.{digits}f}%"


def ms(x):
    return f"{x / 1000:.1f} s" if x >= 1000 else f"{x:.0f} ms"


def mib(x):
    return f"{x / 2**20:.1f} MiB"


def small(x):
    return f"{x:.1e}" if x < 1e-4 else f"{x:.2g}" if x < 0.01 else f"{x:.3f}"


def ratio(row, key="ratio"):
    if key not in row:
        return ""
    return f"{row[key]:.1f}× ({row[key + '_min']:.1f}–{row[key + '_max']:.1f})"


class Page:
    def __init__(self, results, out):
        self.r = results
        self.out = out
        self.parts = []
        os.makedirs(os.path.join(out, PLOTS), exist_ok=True)

    def add(self, *texts):
        self.parts += [t if t.endswith("\n") else t + "\n" for t in texts]

    def plot(self, name, text, needs, draw, size=(8, 4)):
        """A plot where all that it needs was measured; else the reason why it is not there."""
        missing = [n for n in needs if self.r.get(n) is None]
        if missing:
            self.add(f"*No plot \"{text}\": {missing[0]}: {self.r.why_not(missing[0])}*")
            return
        style.draw(os.path.join(self.out, PLOTS), name, draw, size)
        self.add(style.picture(PLOTS, name, text))

    def section(self, title, names, body):
        """body(*results) where all were measured."""
        self.add(f"## {title}\n", self.r.command(*names))
        missing = [n for n in names if self.r.get(n) is None]
        for name in missing:
            self.add(f"*{name}: {self.r.why_not(name)}*")
        if not missing:
            body(*(self.r.get(n) for n in names))


# ---- what was to be shown ----

def goals(r):
    """(what, measured, target, met) for each figure that kvlite set out to reach and that was measured."""
    found = []

    def goal(what, value, text, target, most):
        found.append((what, text(value), ("≤ " if most else "≥ ") + text(target), value <= target if most else value >= target))

    def times(x):
        return f"{x:.1f}×"

    azure, azure4, mooncake, million = (r.get(n) for n in ("trace-azure-f16", "trace-azure-int4", "trace-mooncake", "trace-million"))
    if azure:
        goal("KV memory wasted, F16, Azure conversations", azure["continuous"]["waste"], percent, 0.02, True)
    if azure4:
        goal("KV memory wasted, int4, Azure conversations", azure4["continuous"]["waste"], percent, 0.05, True)
    for name, report in (("Azure", azure), ("Mooncake", mooncake)):
        if not report:
            continue
        c = report["continuous"]
        goal(f"rate of an ideal schedule reached, {name}", c["of_ideal"], percent, 0.9, False)
        goal(f"requests whose longest gap is within the bound, {name}", c["requests_within_bound"], lambda x: percent(x, 2), 0.99, False)
    sweep = r.get("trace-sweep")
    if sweep:
        least = min((s["hit_rate"] / s["lru_hit_rate"] for s in sweep["sweep"] if s["lru_hit_rate"]), default=1)
        goal("prefix hits over LRU's, the least of all cache sizes", least, lambda x: f"{x:.3f}×", 1.0, False)
    core = r.get("bench-core") or {"rows": [], "capacity": []}
    for row in core["rows"]:
        if row["target"]:
            goal(f"{row['what']}, p50", row["p50"], lambda x, unit=row["unit"]: f"{x:.3g} {unit}", row["target"], True)
    if million:
        goal("a million requests replayed", million["wall"]["seconds"], lambda x: f"{x / 60:.1f} min", 600, True)
        goal("host bytes of a waiting request beside its tokens", million["continuous"]["waiting_record_bytes"],
             lambda x: f"{x:.0f} B", 1024, True)
    wiki = {row["kv"]: row for row in r.get("quality-wikitext") or []}
    for kv, target in (("int8", 0.0002), ("balanced", 0.0012), ("int4", 0.005), ("nvfp4", 0.012)):
        if kv in wiki:
            goal(f"KL divergence, {kv}, WikiText-2", wiki[kv]["kld_mean"], lambda x: f"{x:.5f}", target, True)
    attention = r.get("peer-attention")
    if attention:
        found.extend(attention_goals(attention["rows"], times))
    llm = {row["what"]: row for row in (r.get("peer-llm") or {"rows": []})["rows"]}
    for what, target in (("prefill", 3), ("one stream", 1.5), ("eight streams, decode", 3), ("eight streams, whole", 3), ("longest gap", 10)):
        if what in llm:
            goal(f"{what}, SmolLM2, llama.cpp's times", llm[what]["ratio"], times, target, False)
    for row in core["capacity"]:
        goal(f"conversations of {row['tokens']:,} tokens in equal bytes, int4 to F16 pages, {row['model']}", row["ratio"],
             lambda x: f"{x:.2f}×", row["target"], False)
    return found


def attention_goals(rows, times):
    decode = [row for row in rows if row["what"] == "decode"]
    f16 = [row for row in decode if row["kv"] == "kvlite f16"]
    good = [row for row in f16 if row["ratio"] >= 3 or row.get("ceiling_share", 0) >= 0.7]
    found = [("decode attention F16: ≥ 3× ggml's best layout or ≥ 70% of the ceiling", f"{len(good)} of {len(f16)} cells",
              "all", len(good) == len(f16))]
    at16k = [row for row in f16 if plots.tokens(row["context"]) == "16k"]
    low = min((row["cache_ratio"] for row in at16k), default=0)
    found.append(("decode attention F16 at 16k, llama.cpp's layout, the least", times(low), "≥ 10×", low >= 10))
    for what in ("int8", "int4", "nvfp4"):
        cells = [row for row in decode if row["kv"] == f"kvlite {what}"]
        good = [row for row in cells if row["ratio"] >= 4]
        found.append((f"decode attention {what}: ≥ 4× ggml's best layout", f"{len(good)} of {len(cells)} cells", "all",
                      len(good) == len(cells)))
    prefill = [row for row in rows if row["what"] == "prefill" and "ratio" in row]
    good = [row for row in prefill if row["ratio"] >= 2]
    found.append(("prefill attention: ≥ 2× ggml's best layout", f"{len(good)} of {len(prefill)} cells", "all",
                  len(good) == len(prefill)))
    return found


# ---- sections ----

def scheduling(page):
    r = page.r

    def modes(*reports):
        rows = []
        for name, report in zip(("Azure, f16", "Mooncake, int8", "13B, exponential lengths", "13B, even lengths"), reports):
            for mode in ("static", "request", "contiguous", "continuous", "ideal"):
                m = report[mode]
                rows.append([name, mode, f"{m['tokens_per_s']:,.0f}", f"{m['tokens_per_s'] / report['static']['tokens_per_s']:.2f}×",
                             percent(m["waste"]) if "waste" in m else "", ms(m["ttft_ms"]["p50"]) if "ttft_ms" in m else "",
                             m.get("preemptions", "")])
        page.add(table(["workload", "batching", "tokens/s", "of static", "waste", "first token p50", "preemptions"], rows))
        page.plot("batching", "Ways of batching", [], lambda f, t: plots.batching(
            f, t, list(zip(("Azure\nconversations", "Mooncake\nconversations", "13B, 40 GB,\nexponential", "13B, 40 GB,\neven"), reports))), size=(11, 4))
        page.add("Each way has the same bytes, model and cost of a step (`build/trace --help` defines them). ideal: the least time in which any "
                 "schedule could do the work with the prefix hits that there were; kvlite reaches "
                 + ", ".join(percent(r["continuous"]["of_ideal"]) for r in reports)
                 + " of its rate. The 13B rows are the setting for which 23 times the throughput of static batching was reported: OPT-13B on a "
                 "40 GB card, prompts of 512 tokens, answers of random length up to 1,536. That figure compared programs, with their kernels; here "
                 "only the batching and the memory differ.")

    page.section("Batching on real traces", ["trace-azure-f16", "trace-mooncake", "trace-23x", "trace-23x-even"], modes)

    def waste(f16, int4):
        page.add(table(["preset", "waste", "slab slack", "ledger peak", "budget"],
                       [[name, percent(c["waste"], 2), percent(c["slab_slack"], 2), mib(c["ledger_peak_bytes"]), mib(c["ledger_budget_bytes"])]
                        for name, c in (("f16", f16["continuous"]), ("int4", int4["continuous"]))]))
        page.plot("waste", "Memory that holds nothing", [], lambda f, t: plots.waste(f, t, [("f16", f16), ("int4", int4)]))

    page.section("Memory wasted", ["trace-azure-f16", "trace-azure-int4"], waste)

    def gaps(chunked, whole):
        rows = []
        for name, report in (("in chunks", chunked), ("in one piece", whole)):
            c = report["continuous"]
            rows.append([name, *(ms(c["tbt_ms"][q]) for q in ("p50", "p99", "max")), ms(c["longest_gap_ms"]["p50"]),
                         ms(c["longest_gap_ms"]["p99"]), percent(c["requests_within_bound"], 2), ms(c["ttft_ms"]["p50"])])
        page.add(table(["prompts run", "gap p50", "gap p99", "gap max", "a request's longest, p50", "p99", "requests within the bound",
                        "first token p50"], rows))
        page.plot("gaps", "How long a stream waits", [], lambda f, t: plots.gaps(
            f, t, [("prompts in chunks", chunked), ("prompts in one piece", whole)], chunked["max_gap_ms"]))

    page.section("Gaps between tokens", ["trace-azure-steady", "trace-azure-whole"], gaps)

    def hits(report):
        page.add(f"{report['requests']:,} requests of the trace, all there from the beginning; {report['dropped']:,} more are left out at every size "
                 "since the smallest cache does not hold them.\n")
        page.add(table(["KV", "kvlite", "LRU, whole blocks", "Belady's optimum"],
                       [[f"{s['kv_bytes'] / 2**30:g} GiB", *(percent(s[k], 2) for k in ("hit_rate", "lru_hit_rate", "belady_hit_rate"))]
                        for s in report["sweep"]]))
        page.plot("hit_rate", "Prefix hits against cache size", [], lambda f, t: plots.hit_rate(f, t, report))

    page.section("Prefix reuse", ["trace-sweep"], hits)

    def bookkeeping(core, million):
        page.add(table(["", "p50", "p99", "target"], [
            [row["what"], f"{row['p50']:,.4g} {row['unit']}", f"{row['p99']:,.4g} {row['unit']}", f"{row['target']:g}" if row["target"] else ""]
            for row in core["rows"]]))
        w, c = million["wall"], million["continuous"]
        page.add(f"{million['requests']:,} requests ({million['prompt_tokens'] + million['output_tokens']:,} tokens) replayed in "
                 f"{w['seconds'] / 60:.1f} minutes: plan p50 {w['plan_us']['p50']:.1f} µs, commit {w['commit_us']['p50']:.1f} µs; "
                 f"{c['waiting_record_bytes']:.0f} bytes a waiting request beside its tokens, and {c['waiting_answer_bytes']:,.0f} of room kept for the "
                 "tokens of its answer.")

    page.section("Bookkeeping", ["bench-core", "trace-million"], bookkeeping)
    return r


def quality(page):
    head = ["KV", "bits a number", "perplexity", "Δ %", "KLD mean", "p99", "p99.9", "same top-1"]

    def row(x):
        return [x["kv"], f"{x['bits']:.2f}", f"{x['ppl']:.3f}", f"{x['dppl_percent']:+.2f}", small(x["kld_mean"]), small(x["kld_p99"]),
                small(x["kld_p999"]), f"{x['top1_percent']:.1f}%"]

    def wikitext(ours):
        first = ours[0]
        page.add(f"{first['predictions']:,} predictions: the second half of {first['chunks']} chunks of {first['ctx']:,} tokens of "
                 "WikiText-2; against the same model with an F32 cache, float activations. The F16 row is the noise floor; the last "
                 "row is what the runner's int8 activations cost alone.\n")
        page.add(table(head, [row(x) for x in ours]))

    page.section("Quality of the formats", ["quality-wikitext"], wikitext)

    def llama(theirs):
        page.add("llama.cpp on the same text, counted the same way, against its own F32 cache; its activations are int8 in every row, "
                 "so that its F16 row shows its noise floor.\n")
        page.add(table(head, [row(x) for x in theirs]))

    page.section("The same with llama.cpp", ["peer-quality"], llama)
    ours = [x for x in page.r.get("quality-wikitext") or [] if "only" not in x["kv"] and x["act"] == "f32"]
    page.plot("quality", "Quality against bits", ["quality-wikitext"],
              lambda f, t: plots.quality(f, t, ours, page.r.get("peer-quality") or []))

    def confirmed(*others):
        names = [x["kv"] for x in others[0] if x["kld_mean"] > 0]
        by = [{x["kv"]: x for x in rows} for rows in others]
        page.add(table(["KLD mean"] + [f"{rows[0]['text']}, {rows[0]['ctx']:,} tokens" for rows in others],
                       [[n] + [small(b[n]["kld_mean"]) if n in b else "" for b in by] for n in names]))
        orders = [sorted((n for n in names if n in b), key=lambda n: b[n]["kld_mean"]) for b in by]
        page.add("Ranking by divergence: " + "; ".join(f"{rows[0]['text']} at {rows[0]['ctx']:,}: {', '.join(order)}"
                                                      for rows, order in zip(others, orders)) + ".")

    page.section("Another text, longer contexts", ["quality-alice", "quality-4096"], confirmed)

    def retrieval(rows):
        page.add(f"{rows[0]['asked']} facts asked for at the end of contexts of {rows[0]['ctx']:,} tokens.\n")
        page.add(table(["KV", "right", "same answer as F32"],
                       [[x["kv"], f"{x['recall_percent']:.1f}%", f"{x['same_percent']:.1f}%"] for x in rows]))

    page.section("Facts found in a long context", ["quality-retrieval"], retrieval)


def attention(page):
    def body(report):
        rows = [row for row in report["rows"] if "ratio" in row]
        page.add(f"{report['threads']} threads. The number is ggml's time over kvlite's within the same round (median, least–most), against "
                 "the better of ggml's layouts in the nearest format; then against the layout that llama.cpp's cache has.\n")
        for what in ("decode", "prefill"):
            chosen = [row for row in rows if row["what"] == what and row["kv"] in ("kvlite f16", "kvlite int8", "kvlite int4", "kvlite nvfp4")]
            if not chosen:
                continue
            cells = [[row["kv"].removeprefix("kvlite "), row["d"], row["gqa"], plots.tokens(row["context"]), f"{row['us']:,.0f}",
                      ratio(row), ratio(row, "cache_ratio"),
                      percent(row["ceiling_share"], 0) if "ceiling_share" in row else ""] for row in chosen]
            page.add(f"### {what.capitalize()}\n", table(["KV", "D", "GQA", "context", "µs", "ggml, best layout", "llama.cpp's layout",
                                                          "of the F16 ceiling"], cells))
        page.plot("attention", "Decode attention against context", [], lambda f, t: plots.attention(f, t, report))

    page.section("Attention beside ggml", ["peer-attention"], body)


def end_to_end(page):
    def body(report):
        rows = [[row["what"], row["unit"], f"{row['kvlite']:,.4g}", f"{row['peer']:,.4g}", ratio(row)]
                for row in report["rows"] if row["unit"] != "bytes"]
        page.add(f"{report['model']}, {report['threads']} threads, {report['rounds']} rounds in turns; kvlite's KV in {report['kv']}, llama.cpp's "
                 f"in f16.\n")
        page.add(table(["", "unit", "kvlite", report["peer"], "better by (least–most)"], rows))

    page.section("A model end to end, beside llama.cpp", ["peer-llm"], body)

    def demo(d):
        live, rates, gap, memory, again = d["live"], d["rates"], d["gap"], d["memory"], d["next_token"]
        page.add(table(["", "kvlite", "without"], [
            [f"tokens/s, {rates['streams']} streams", f"{rates['together_tokens_per_s']:.0f} together", f"{rates['one_at_a_time_tokens_per_s']:.0f} one at a time"],
            ["KV memory", f"{mib(memory['peak_bytes'])} at the peak", f"{mib(memory['reserved_bytes'])} reserved, {mib(memory['final_bytes'])} at the final sizes"],
            ["prompt tokens computed", live["prompt_tokens"] - live["reused_tokens"], live["prompt_tokens"]],
            [f"longest wait while {gap['prompt_tokens']:,} tokens come in", ms(gap["chunked_ms"]), ms(gap["whole_ms"])],
            [f"a token after {again['tokens']:,}", f"{again['cached_ms']:.1f} ms", ms(again["recomputed_ms"])]]))

    page.section("Eight conversations (`make demo`)", ["demo"], demo)


def capacity(page):
    def body(core):
        names = ["reserved", "f16", "int8", "int8+", "fp8", "balanced", "int4", "nvfp4"]
        page.add("Conversations that a cache of so many bytes takes in. reserved: contiguous F16 buffers of 4,096 tokens, as engines without "
                 "pages set aside.\n")
        page.add(table(["model", "tokens each", "bytes", *names],
                       [[row["model"], f"{row['tokens']:,}", f"{row['bytes'] / 2**30:.0f} GiB",
                         *(f"{row[n]:,} ({row[n] / row['f16']:.2f}×)" for n in names)] for row in core["capacity"]]))
        last = [row for row in core["capacity"] if row["model"] == core["capacity"][-1]["model"]]
        per = 2**34 / last[0]["bytes"]
        page.plot("capacity", "Conversations in 16 GiB", [], lambda f, t: plots.capacity(
            f, t, last[0]["model"], [(n, {row["tokens"]: row[n] * per for row in last}) for n in names]))

    page.section("Conversations in the memory there is", ["bench-core"], body)


def load(name):
    try:
        with open(os.path.join(HERE, "results", name), encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        return None


def build(out):
    r = Results()
    page, after = Page(r, out), Page(r, out)
    on_gpu = gpu.section(after, table, load("gpu_check.json"), load("cuda-static.json"))
    on_gpu += vulkan.section(after, table, r.get("bench-vulkan"), load("gpu_check.json"), load("vulkan-static.json"))
    page.add("# Benchmarks\n",
             "Written by `make report` from the files in tools/report/results, one for each measurement; each section begins with the command "
             "that measured it; DATA is the folder of traces and texts. Machine: " + "; ".join(r.machines()) + ". Where programs are compared, they "
             "ran in turns in one process: ratios within one run say more than times.\n")
    if any(record.get("quick") for record in r.records.values()):
        page.add("**Some of these figures are from a quick run (`QUICK=1`): fewer rounds and smaller cases.**\n")
    reached = goals(r) + on_gpu
    page.add("## What was to be reached\n",
             table(["", "measured", "target", ""], [[what, value, target, "yes" if met else "**no**"] for what, value, target, met in reached]))
    missed = [what for what, _, _, met in reached if not met]
    if missed:
        with open(os.path.join(HERE, "missed.md"), encoding="utf-8") as f:
            page.add(f.read())
    for part in (scheduling, capacity, quality, attention, end_to_end):
        part(page)
    page.add(*after.parts)
    with open(os.path.join(HERE, "owed.md"), encoding="utf-8") as f:
        page.add(f.read())
    with open(os.path.join(out, "BENCHMARKS.md"), "w", encoding="utf-8") as f:
        f.write("\n".join(p.rstrip("\n") + "\n" for p in page.parts))
    print(f"BENCHMARKS.md: {len(reached)} targets, {len(missed)} missed" + "".join(f"\n  missed: {m}" for m in missed))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default=ROOT, help="folder for BENCHMARKS.md and plots")
    sys.exit(build(os.path.abspath(parser.parse_args().out)))
