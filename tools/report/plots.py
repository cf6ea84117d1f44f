"""The plots of BENCHMARKS.md, drawn from tools/report/results/*.json alone. One function each: plot(figure, theme, data)."""

import math


def bare(axes, xlabel, ylabel, title=None):
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if title:
        axes.set_title(title)
    axes.grid(axis="x", visible=False)


def tokens(n):
    """1007 and 16367 are called 1k and 16k."""
    return f"{round(n / 1024)}k" if n >= 1000 else str(n)


def log_ticks(axis, values, text):
    axis.set_ticks(values, [text(v) for v in values])
    axis.set_ticks([], minor=True)


def label_ends(axes, lines, theme):
    """A name at the right end of each line, moved apart where two would overlap."""
    low, high = axes.get_ylim()
    log = axes.get_yscale() == "log"

    def place(y):
        return math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)

    ends = sorted((place(y), name, color) for y, name, color in lines)
    places, step = [e[0] for e in ends], 0.055
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + step)
    limit = 1.02
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - step
    for at, (_, name, color) in zip(places, ends):
        axes.annotate(name, (1.01, at), xycoords="axes fraction", color=color, fontsize=8.5, va="center")


ATTENTION = [("kvlite f16", 0, "-"), ("kvlite int8", 1, "-"), ("kvlite int4", 2, "-"),
             ("ggml f16 heads", 0, ":"), ("ggml q8_0 heads", 1, ":"), ("ggml q4_0 heads", 2, ":"), ("ggml f16 cache", 6, "--")]


def attention(figure, theme, data, dim=128, gqa=4):
    """Decode attention time against context, with what reading the F16 bytes would take."""
    axes = figure.subplots()
    rows = [r for r in data["rows"] if r["what"] == "decode" and r["d"] == dim and r["gqa"] == gqa]
    ends = []
    for name, color, style in ATTENTION:
        points = sorted((r["context"], r["us"]) for r in rows if r["kv"] == name)
        if not points:
            continue
        axes.plot(*zip(*points), linestyle=style, marker="o", markersize=3, color=theme["colors"][color])
        ends.append((points[-1][1], name, theme["colors"][color]))
    read = sorted((r["context"], r["bytes"] / r["read_gbs"] / 1e3) for r in rows if "read_gbs" in r)
    if read:
        axes.plot(*zip(*read), color=theme["ink"], linewidth=1)
        ends.append((read[-1][1], "reading the f16 bytes", theme["ink"]))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    log_ticks(axes.xaxis, sorted({r["context"] for r in rows}), tokens)
    bare(axes, "tokens of context", "µs, one layer, one token", f"Decode attention, 8 KV heads × GQA {gqa}, D = {dim}")
    label_ends(axes, ends, theme)


def waste(figure, theme, runs):
    """runs: [(name, trace report)]: share of allocated KV bytes that hold no token, over the trace's time."""
    axes = figure.subplots()
    ends = []
    for i, (name, report) in enumerate(runs):
        color = theme["colors"][i]
        series = report["continuous"]["series"]
        hours = [p["ms"] / 3.6e6 for p in series]
        axes.plot(hours, [100 * p["waste"] for p in series], color=color, linewidth=1.2)
        ends.append((100 * report["continuous"]["waste"], f"kvlite {name}", color))
    for mode, color in (("contiguous", 3), ("static", 6)):
        if mode in runs[0][1]:
            percent = 100 * runs[0][1][mode]["waste"]
            axes.axhline(percent, color=theme["colors"][color], linestyle="--")
            ends.append((percent, f"{mode}, mean", theme["colors"][color]))
    axes.set_yscale("log")
    axes.set_ylim(0.3, 120)
    log_ticks(axes.yaxis, [0.5, 1, 2, 5, 10, 20, 50, 100], lambda v: f"{v:g}%")
    bare(axes, "hours of the trace", "allocated KV bytes without a token", "Memory that holds nothing")
    label_ends(axes, ends, theme)


MODES = ("static", "request", "contiguous", "continuous", "ideal")


def batching(figure, theme, runs):
    """runs: [(name, trace report)]: rate of each way of batching, over that of static batching."""
    axes = figure.subplots()
    width = 0.16
    for m, mode in enumerate(MODES):
        rates = [r[mode]["tokens_per_s"] / r["static"]["tokens_per_s"] for _, r in runs]
        at = [i + (m - 2) * width for i in range(len(runs))]
        color = theme["colors"][(6, 5, 3, 0, 2)[m]]
        bars = axes.bar(at, rates, width * 0.92, color=color, label=f"kvlite ({mode})" if mode == "continuous" else mode)
        axes.bar_label(bars, [f"{v:.1f}×" for v in rates], fontsize=7.5, padding=2)
    axes.set_xticks(range(len(runs)), [name for name, _ in runs])
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    bare(axes, "", "tokens/s, of static batching's", "Ways of batching, equal bytes and cost")


def tail(report):
    """[(ms, share of the gaps that are longer)]"""
    histogram = report["continuous"]["gap_histogram"]
    total = sum(n for _, n in histogram)
    points, above = [], total
    for upper, n in histogram:
        above -= n
        points.append((upper, above / total))
    return [p for p in points if p[1] > 0] + [(points[-1][0], 1 / total)]


def gaps(figure, theme, runs, bound):
    """runs: [(name, trace report)]: how many of the waits between two tokens are longer than so many milliseconds."""
    axes = figure.subplots()
    ends = []
    for i, (name, report) in enumerate(runs):
        points = tail(report)
        axes.step(*zip(*points), where="post", color=theme["colors"][i])
        axes.plot([], [], color=theme["colors"][i], label=name)
        ends.append(points[-1])
    axes.axvline(bound, color=theme["ink"], linewidth=1, linestyle="--")
    axes.annotate(f"asked for: {bound:g} ms", (bound, 0.5), color=theme["ink"], fontsize=8.5, ha="right", xytext=(-4, 0),
                  textcoords="offset points", rotation=90, va="center", xycoords=("data", "axes fraction"))
    axes.set_xscale("log")
    axes.set_yscale("log")
    log_ticks(axes.xaxis, [20, 50, 100, 200, 500, 1000, 2000, 5000, 10000],
              lambda v: f"{v / 1000:g} s" if v >= 1000 else f"{v:g} ms")
    axes.set_xlim(15, max(e[0] for e in ends) * 1.3)
    axes.legend(loc="lower left")
    bare(axes, "a wait between two tokens", "share of waits that are longer", "How long a stream waits for its next token")


def hit_rate(figure, theme, report):
    axes = figure.subplots()
    rows = report["sweep"]
    sizes = [r["kv_bytes"] / 2**30 for r in rows]
    ends = []
    for key, name, color, style in (("belady_hit_rate", "Belady's optimum", 6, "--"), ("hit_rate", "kvlite", 0, "-"),
                                    ("lru_hit_rate", "LRU, whole blocks", 1, ":")):
        axes.plot(sizes, [100 * r[key] for r in rows], linestyle=style, marker="o", markersize=3,
                  color=theme["colors"][color])
        ends.append((100 * rows[-1][key], name, theme["colors"][color]))
    axes.set_xscale("log", base=2)
    log_ticks(axes.xaxis, sizes, lambda v: f"{v:g}")
    axes.set_ylim(bottom=0)
    bare(axes, "GiB for KV", "prompt tokens found, %", "Prompt tokens that the prefix cache has")
    label_ends(axes, ends, theme)


def quality(figure, theme, ours, peer):
    """Divergence against bits a number; ours and peer: rows of build/quality and of bench_peer_quality."""
    axes = figure.subplots()
    for rows, color, marker, label in ((ours, 0, "o", "kvlite"), (peer, 1, "s", "llama.cpp")):
        rows = [r for r in rows if r["kld_mean"] > 0]
        if not rows:
            continue
        axes.scatter([r["bits"] for r in rows], [r["kld_mean"] for r in rows], color=theme["colors"][color],
                     marker=marker, s=36, label=label, zorder=3)
        for r in rows:
            axes.annotate(r["kv"].replace("llama.cpp ", ""), (r["bits"], r["kld_mean"]), xytext=(6, 3), fontsize=8.5,
                          textcoords="offset points", color=theme["ink"])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    log_ticks(axes.xaxis, [4, 5, 6, 8, 10, 12, 16], lambda v: f"{v:g}")
    axes.set_xlim(4, 18)
    axes.legend(loc="upper right")
    bare(axes, "bits a number, exact blocks and scales counted", "KL divergence from an F32 cache, mean",
         "What a format costs in quality")


def capacity(figure, theme, model, rows):
    """rows: [(name, {tokens: conversations in 16 GiB})]"""
    axes = figure.subplots()
    lengths = sorted({n for _, by in rows for n in by})
    width = 0.8 / len(lengths)
    for i, n in enumerate(lengths):
        at = [k + (i - (len(lengths) - 1) / 2) * width for k in range(len(rows))]
        bars = axes.bar(at, [by[n] for _, by in rows], width * 0.92, color=theme["colors"][i], label=f"{n:,} tokens each")
        axes.bar_label(bars, [f"{by[n]:,.0f}" for _, by in rows], fontsize=8, padding=2)
    axes.set_xticks(range(len(rows)), [{"reserved": "f16, 4,096\nreserved", "f16": "f16\npages"}.get(n, n) for n, _ in rows])
    axes.legend(loc="upper left")
    bare(axes, "", "conversations", f"Conversations in 16 GiB of KV, {model}")
