#!/usr/bin/env python3
"""PyTorch's scaled_dot_product_attention on the shapes of bench_cuda: contiguous F16, no pages, a roof for F16.

    bench_cuda --list | bench_torch.py >FILE      lines "what preset batch context gqa rows"; those of f16 are taken

A graph of calls over more KV than the L2 cache holds is replayed. JSON, an object a line: section, what, preset, batch,
context, gqa, rows, kernel, us. Status 77: torch is not there, or sees no GPU.
"""
import json
import sys
import time

try:
    import torch
    from torch.nn.functional import scaled_dot_product_attention
except (ImportError, OSError) as why:  # OSError: a library of its is not there
    print(f"SKIP: {why}")
    sys.exit(77)

DIM, KV_HEADS, MOST_LAYERS, SLICE = 128, 8, 64, 0.02


def replayed(calls):
    """Seconds of one of the calls, captured and replayed in turn; the middle of three."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    seconds, n = [], 1
    while len(seconds) < 3:
        start = time.perf_counter()
        for _ in range(n):
            graph.replay()
        torch.cuda.synchronize()
        spent = time.perf_counter() - start
        if spent >= SLICE:
            seconds.append(spent / n / len(calls))
        else:
            n *= 2
    return sorted(seconds)[1]


def rand(*shape):
    return torch.rand(*shape, device="cuda", dtype=torch.float16) * 2 - 1


def decode(batch, context, gqa, layers):
    q = rand(batch, KV_HEADS * gqa, 1, DIM)
    kv = [(rand(batch, KV_HEADS, context + 1, DIM), rand(batch, KV_HEADS, context + 1, DIM)) for _ in range(layers)]
    return [lambda k=k, v=v: scaled_dot_product_attention(q, k, v, enable_gqa=True) for k, v in kv]


def prefill(batch, gqa, rows):
    q, k, v = (rand(batch, KV_HEADS * n, rows, DIM) for n in (gqa, 1, 1))
    return [lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)]


def main():
    if not torch.cuda.is_available():
        print("SKIP: torch sees no GPU")
        return 77
    l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
    for line in sys.stdin:
        what, preset, *numbers = line.split()
        batch, context, gqa, n = (int(x) for x in numbers)
        if preset != "f16" or (what == "prefill" and context):  # SDPA's causal mask begins at the first key
            continue
        one = 4 * batch * (context + n) * KV_HEADS * DIM
        layers = min(MOST_LAYERS, max(1, -(-4 * l2 // one))) if what == "decode" else 1
        if layers * one + (1 << 30) > torch.cuda.mem_get_info()[0]:
            print(f"left out: {line.strip()}: memory", file=sys.stderr)
            continue
        try:
            calls = decode(batch, context, gqa, layers) if what == "decode" else prefill(batch, gqa, n)
            seconds = replayed(calls)
        except (RuntimeError, TypeError) as why:  # an old torch has no enable_gqa
            print(f"left out: {line.strip()}: {str(why).splitlines()[0]}", file=sys.stderr)
            continue
        finally:
            calls = None
            torch.cuda.empty_cache()
        print(json.dumps({"section": "torch", "what": what, "preset": preset, "batch": batch, "context": context, "gqa": gqa,
                          "rows": n, "kernel": f"sdpa {torch.__version__}", "us": seconds * 1e6}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
