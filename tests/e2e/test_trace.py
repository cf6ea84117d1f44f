#!/usr/bin/env python3
"""build/trace: reports that were computed by hand, the same report twice, oracles in their order, replay, bad input.

usage: test_trace.py [-k WORD] [BUILD_FOLDER [DATA_FOLDER]]      -k: only the cases with WORD in their name

Oracles: arithmetic in the comments, a least-recently-used cache and an exhaustive search for the best one in Python.
"""
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile

from cases import Skip, run_functions

ARGS = sys.argv[1:]
ONLY = ""
if ARGS[:1] == ["-k"]:
    ONLY, ARGS = ARGS[1], ARGS[2:]
BUILD = ARGS[0] if ARGS else os.environ.get("BUILD", "build")
DATA = ARGS[1] if len(ARGS) > 1 else os.environ.get("DATA", "../shared/data")
SCRATCH = tempfile.TemporaryDirectory()
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def file(name, content):
    path = os.path.join(SCRATCH.name, name)
    with open(path, "wb") as f:
        f.write(content if isinstance(content, bytes) else content.encode())
    return path


def run(*args, code=0):
    p = subprocess.run([os.path.join(BUILD, "trace"), *map(str, args)], capture_output=True, timeout=120)
    err = p.stderr.decode()
    assert p.returncode == code, f"{args}: exit code {p.returncode}, not {code}: {err}"
    return p.stdout.decode(), err


def report(*args):
    return json.loads(run(*args, "--json")[0])


def refused(words, *args, code=1):
    out, err = run(*args, code=code)
    line = err.strip().splitlines()[-1]
    assert out == "" and line.startswith("trace: "), (out, err)
    missing = [w for w in words if w not in line]
    assert not missing, f"{args}: {missing} not in {line!r}"


def near(a, b, what=""):
    assert abs(a - b) <= 1e-6 * max(1, abs(b)), f"{what}: {a} is not {b}"


def azure(*requests):  # (seconds after 18:00, prompt, answer)
    return HEADER + "".join(f"2023-11-16 18:{int(s // 60):02}:{s % 60:010.7f},{p},{n}\n" for s, p, n in requests)


def mooncake(*requests):  # (ms, prompt, answer, hashes)
    return "".join(json.dumps({"timestamp": t, "input_length": p, "output_length": n, "hash_ids": h}) + "\n"
                   for t, p, n, h in requests)


# One layer of one head of 16 dimensions in f16: 64 bytes a token, 2048 a block of 32.
TINY = ("--model", "1:1:16", "--kv", "f16", "--max-gap-ms", "0")
BLOCK = 2048


def one_ms_a_step():
    return file("one.txt", "step_ms = 1; // and nothing else\n")


# ---- computed by hand ----

def test_waste_and_times_by_hand():
    # Prompt of 40: two blocks of 32 with 24 rows free in its step, then 23, then 22; each step takes 1 ms.
    # The second request, 10 s later: 31 tokens and 1 of answer: one block with 1 row free.
    # The third, 10 s after that, fills its block.
    trace = file("hand.csv", azure((0, 40, 3), (10, 31, 1), (20, 32, 1)))
    r = report("--trace", trace, *TINY, "--kv-bytes", "1M", "--cost", one_ms_a_step())
    c = r["continuous"]
    near(c["waste"], (24 + 23 + 22 + 1 + 0) / (3 * 64 + 2 * 32), "waste")
    assert c["steps"] == 5 and r["prompt_tokens"] == 103 and r["output_tokens"] == 5 and c["prefill_rows"] == 103, c
    near(c["makespan_ms"], 20001)
    near(c["busy_ms"], 5)
    near(c["tokens_per_s"], 108 / 20.001)
    near(c["ttft_ms"]["p50"], 1)
    near(c["tbt_ms"]["max"], 1)
    near(c["longest_gap_ms"]["p99"], 1)
    assert c["within_bound"] == 1 and c["preemptions"] == 0 and c["hit_rate"] == 0
    near(r["kv_token_bytes"], 64)


def test_packed_waste_by_hand():
    # int8, 16 dimensions: a packed tile is 32*16 + 64 bytes of scales, padded to 640; an exact one 1024. A prompt of 100
    # tokens: the first block exact (2048), two packed (2560), the open one exact (2048) with 28 rows free, then 27.
    trace = file("packed.csv", azure((0, 100, 2)))
    c = report("--trace", trace, "--model", "1:1:16", "--kv", "int8", "--kv-bytes", "1M", "--cost", one_ms_a_step())["continuous"]
    near(c["waste"], (28 + 27) * 64 / (2 * (2048 + 2 * 1280 + 2048)), "waste")


def test_cost_by_hand():
    # One request at a time. Prefill of 64: 1 + 64*0.5 + 64*64/2 pairs * 1e-6 * 1000; decode at 64 tokens: 1 + 2 +
    # 64.5 tokens of 64 bytes at 1e6 ms a GB.
    cost = file("cost.txt", "step_ms = 1;\nprefill_token_ms = 0.5;\ndecode_ms = 2;\nkv_gb_ms = 1000000;\nprefill_kv_ms = 1000;\n")
    c = report("--trace", file("c.csv", azure((0, 64, 2))), *TINY, "--kv-bytes", "1M", "--cost", cost)["continuous"]
    first = 1 + 32 + 2.048
    near(c["ttft_ms"]["max"], first)
    near(c["makespan_ms"], first + 1 + 2 + 64.5 * 64 * 1e-3)


def test_modes_by_hand():
    # Static: 2 * 20 rows padded, then 4 steps of 2 rows. Request: 30 rows, 2 steps of 2 rows, 2 of 1. The scheduler can do
    # no better than the latter here.
    cost = file("rows.txt", "step_ms = 1;\nprefill_token_ms = 1;\ndecode_ms = 1;\n")
    r = report("--trace", file("m.csv", azure((0, 10, 3), (0, 20, 5))), *TINY, "--kv-bytes", "1M", "--cost", cost, "--mode", "all")
    near(r["static"]["makespan_ms"], 41 + 4 * 3)
    near(r["request"]["makespan_ms"], 31 + 2 * 3 + 2 * 2)
    near(r["contiguous"]["makespan_ms"], 41)
    near(r["continuous"]["makespan_ms"], 41)
    near(r["static"]["speedup"], 53 / 41)
    # All rows are 36; the memory of 16384 tokens holds the 14 + 13 + ... that the decodes hold many times over
    area = 2 * 10 + 3 + 4 * 20 + 10
    near(r["ideal"]["makespan_ms"], 36 + max(area / 16384, 6 / 256))
    # Static holds 25 tokens for each; the first has 10, 11, 12 of them and then nothing that anybody wants
    held = 30 * 41 + 32 * 3 + 34 * 3 + 23 * 3 + 24 * 3
    near(r["static"]["waste"], 1 - held / (50 * 53), "static waste")


def test_hits_by_hand():
    # The second shares one hash, the third is the first again: all but its last token (f16: blocks are shared at any row);
    # caches of whole blocks find 31 of 32.
    trace = file("h.jsonl", mooncake((0, 1024, 1, [1, 2]), (10000, 1024, 1, [1, 3]), (20000, 1024, 1, [1, 2])))
    c = report("--trace", trace, *TINY, "--kv-bytes", "1M", "--cost", one_ms_a_step())["continuous"]
    near(c["hit_rate"], (512 + 1023) / 3072, "hit rate")
    near(c["lru_hit_rate"], (512 + 31 * 32) / 3072, "lru")
    near(c["belady_hit_rate"], (512 + 31 * 32) / 3072, "belady")


def test_oracles_by_hand():
    # 20 blocks; A, B and C have 16 each. LRU keeps the last and 4 blocks of the one before; the optimum keeps A.
    order = [1, 2, 1, 3, 1]
    trace = file("o.jsonl", mooncake(*((1000 * i, 513, 1, [a, 10 + a]) for i, a in enumerate(order))))
    c = report("--trace", trace, *TINY, "--kv-bytes", 20 * BLOCK, "--cost", one_ms_a_step())["continuous"]
    near(c["lru_hit_rate"], 2 * 4 * 32 / (5 * 513), "lru")
    near(c["belady_hit_rate"], 2 * 16 * 32 / (5 * 513), "belady")


# ---- against other implementations ----

def paths(requests):
    """The whole blocks of each prompt, as tuples of what stands before them."""
    for _, prompt, _, hashes in requests:
        yield [tuple(hashes[:i // 16 + 1]) + (i % 16,) for i in range((prompt - 1) // 32)]


def python_lru(requests, capacity):
    cache, hits = {}, 0
    for n, (path, (_, prompt, answer, _)) in enumerate(zip(paths(requests), requests)):
        found = next((i for i, b in enumerate(path) if b not in cache), len(path))
        hits += found * 32
        own = [("own", n, i) for i in range((prompt + answer - 1) // 32 - len(path))]
        for b in list(reversed(own)) + list(reversed(path)):
            cache.pop(b, None)
            cache[b] = True
        while len(cache) > capacity:
            cache.pop(next(iter(cache)))
    return hits


def python_best(requests, capacity):
    """Every choice of what to keep between requests: prefixes of the prompts seen so far."""
    all_paths = list(paths(requests))
    best = {frozenset(): 0}
    for path in all_paths:
        after = {}
        for kept, hits in best.items():
            found = next((i for i, b in enumerate(path) if b not in kept), len(path))
            have = kept | set(path)
            for n in range(min(len(have), capacity) + 1):
                for choice in itertools.combinations(sorted(have, key=str), n):
                    key = frozenset(choice)
                    if after.get(key, -1) < hits + found:
                        after[key] = hits + found
        best = after
    return 32 * max(best.values())


def random_tree(rng, n, depth, width, tail):
    out = []
    for i in range(n):
        length = rng.randint(1, depth)
        # a hash says what stands before it too
        hashes, number = [], 0
        for d in range(length):
            number = number * width + rng.randrange(width) + 1
            hashes.append(d * 1000000 + number)
        out.append((i * 1000, 512 * (length - 1) + rng.choice(tail), rng.randint(1, 60), hashes))
    return out


def test_lru_against_python():
    rng = random.Random(1)
    for case in range(6):
        requests = random_tree(rng, 60, 4, 2, [1, 100, 512])
        total = sum(p for _, p, _, _ in requests)
        for blocks in (70, 100, 300):
            c = report("--trace", file("t.jsonl", mooncake(*requests)), *TINY, "--kv-bytes", blocks * BLOCK,
                       "--cost", one_ms_a_step())
            if c["dropped"]:
                continue
            near(c["continuous"]["lru_hit_rate"], python_lru(requests, blocks) / total, f"case {case}, {blocks} blocks")


def test_belady_against_search():
    # Blocks 0 to 2 of few prompts, and a cache that holds some of them: every choice can be tried. The trace tool's
    # caches are larger, so that only its oracle's arithmetic is compared, at 18 blocks of which the rest is filler.
    rng = random.Random(2)
    for case in range(8):
        requests = [(i * 1000, 33 + 32 * rng.randrange(2), 1, [rng.randrange(3)]) for i in range(7)]
        total = sum(p for _, p, _, _ in requests)
        for blocks in (4, 5):
            c = report("--trace", file("b.jsonl", mooncake(*requests)), *TINY, "--kv-bytes", blocks * BLOCK,
                       "--cost", one_ms_a_step())
            assert not c["dropped"], c["dropped"]
            near(c["continuous"]["belady_hit_rate"], python_best(requests, blocks) / total, f"case {case}, {blocks} blocks")


def test_belady_is_best():
    rng = random.Random(3)
    trace = file("many.jsonl", mooncake(*random_tree(rng, 150, 4, 3, [1, 40, 200, 511, 512])))
    for policy in ("fcfs", "longest-prefix"):
        sweep = report("--trace", trace, *TINY, "--cost", one_ms_a_step(), "--policy", policy,
                       "--sweep", ",".join(str(n * BLOCK) for n in (80, 120, 200, 400, 1000)))["sweep"]
        for p in sweep:
            assert p["lru_hit_rate"] <= p["belady_hit_rate"] + 1e-9, p
            # blocks are shared at any row in f16, not whole alone: up to 31 tokens more a request
            assert p["hit_rate"] <= p["belady_hit_rate"] + 0.05, p
        assert sweep[0]["belady_hit_rate"] < sweep[-1]["belady_hit_rate"], sweep


# ---- the scheduler's promises on a load ----

LOAD = ("--synthetic", "300:200:100:400", "--model", "Llama-3-8B", "--kv-bytes", "2G")


def test_gaps_keep_to_the_bound():
    c = report(*LOAD, "--max-gap-ms", "60")["continuous"]
    assert c["requests_within_bound"] >= 0.99, c["requests_within_bound"]
    assert c["longest_gap_ms"]["p99"] <= 60 * (1 + 1e-6), c["longest_gap_ms"]
    whole = report(*LOAD, "--no-chunking")["continuous"]
    assert whole["longest_gap_ms"]["p99"] > 2 * 60, whole["longest_gap_ms"]


def test_close_to_ideal():
    r = report("--synthetic", "2000:200:100:400", *LOAD[2:], "--mode", "all")
    assert 0.8 <= r["continuous"]["of_ideal"] <= 1, r["continuous"]["of_ideal"]
    assert r["static"]["speedup"] >= r["request"]["speedup"] >= 1, (r["static"]["speedup"], r["request"]["speedup"])
    assert r["continuous"]["waste"] < 0.1 < r["contiguous"]["waste"]


def test_same_report_twice():
    for name, args in (("azure_conv_2023.csv", ()), ("mooncake_conversation.jsonl", ("--kv", "int4", "--learn"))):
        path = os.path.join(DATA, name)
        if not os.path.exists(path):
            raise Skip(f"{path} is not there: DATA_FOLDER as the second argument names the folder of traces")
        a, b = (report("--trace", path, "--limit", 200, "--speed", 4, *args) for _ in range(2))
        assert a["requests"] >= 190 and a.pop("wall") and b.pop("wall")
        assert a == b, "two reports differ"


def test_replay():
    events = os.path.join(SCRATCH.name, "events")
    for args in ((), ("--learn", "--kv", "int4", "--policy", "longest-prefix")):
        run(*LOAD, *args, "--events", events)
        out, _ = run("--replay", events)
        assert "same" in out, out
    with open(events, "rb") as f:
        data = f.read()
    refused(["end record"], "--replay", file("cut", data[:len(data) // 2]))
    broken = bytearray(data)
    broken[len(data) // 2] ^= 1
    refused(["checksum"], "--replay", file("broken", bytes(broken)))
    refused(["/nowhere/events"], "--events", "/nowhere/events", *LOAD)


# ---- bad input ----

GOOD = '{"timestamp": 5, "input_length": 600, "output_length": 2, "hash_ids": [0, 1]}\n'
BAD_TRACES = [
    ("empty", b"", ["no requests"]),
    ("no column", "TIMESTAMP,ContextTokens\n", [":1:", "GeneratedTokens"]),
    ("number", HEADER + "2023-11-16 18:15:46,12x,3\n", [":2:", "12x"]),
    ("negative", azure((0, 1, 1)) + "2023-11-16 18:15:46,-5,3\n", [":3:", "-5"]),
    ("zero", HEADER + "2023-11-16 18:15:46,0,3\n", [":2:", "prompt"]),
    ("no answer", HEADER + "2023-11-16 18:15:46,4,0\n", [":2:", "answer"]),
    ("huge", HEADER + "2023-11-16 18:15:46,99999999999999999999999,3\n", [":2:", "ContextTokens"]),
    ("large", HEADER + "2023-11-16 18:15:46,4000000000,3\n", [":2:", "4000000000"]),
    ("columns", HEADER + "2023-11-16 18:15:46,4\n", [":2:", "2 columns"]),
    ("time", HEADER + "yesterday,4,4\n", [":2:", "yesterday"]),
    ("hour", HEADER + "2023-11-16 25:15:46,4,4\n", [":2:", "25:15"]),
    ("order", azure((5, 1, 1), (4, 1, 1)), [":3:", "earlier"]),
    ("nul", HEADER.encode() + b"2023-11-16 18:15:46,4,4\n2023-11-16 18:15:46,4\0,4\n", [":3:", "NUL"]),
    ("cut", GOOD + GOOD[:40], [":2:", "JSON"]),
    ("behind", GOOD + GOOD.strip() + " x\n", [":2:", "JSON"]),
    ("array", GOOD + "[1]\n", [":2:", "object"]),
    ("missing", '{"timestamp": 0, "input_length": 5, "hash_ids": [1]}\n', [":1:", "output_length"]),
    ("no hashes", '{"timestamp": 0, "input_length": 5, "output_length": 5}\n', [":1:", "hash_ids"]),
    ("hashes", GOOD.replace("[0, 1]", "[0]"), [":1:", "hash_ids"]),
    ("hash", GOOD.replace("[0, 1]", '[0, "1"]'), [":1:", "hash_ids"]),
    ("minus", GOOD.replace("[0, 1]", "[0, -1]"), [":1:", "-1"]),
    ("fraction", GOOD.replace("600", "600.5"), [":1:", "600.5"]),
    ("infinite", GOOD.replace("600", "1e999"), [":1:", "prompt"]),
    ("past", GOOD + GOOD.replace("5,", "4,", 1), [":2:", "earlier"]),
    ("before", GOOD.replace("5,", "-5,", 1), [":1:", "negative"]),
    ("deep", "{" + "[" * 100000, [":1:", "JSON"]),
]


def test_malformed_traces():
    for name, content, words in BAD_TRACES:
        refused(words, "--trace", file(name, content))
    refused(["/nowhere"], "--trace", "/nowhere")
    refused([SCRATCH.name], "--trace", SCRATCH.name)
    refused([":1:", "JSON"], "--format", "mooncake", "--trace", file("a.csv", azure((0, 1, 1))))


def test_malformed_costs():
    for content, words in (("step_ms = 1;\nstep_ms 2;\n", [":2:"]), ("\n\nsteps = 1;\n", [":3:", "steps"]),
                           ("step_ms = -1;", [":1:", "step_ms"]), ("step_ms = nan;", [":1:"]), ("// nothing\n", ["no time"])):
        refused(words, "--synthetic", "1:1:1:1", "--cost", file("bad.txt", content))


def test_wrong_options():
    for words, args in ((["--trace"], ()), (["--frobnicate"], ("--frobnicate",)), (["--limit"], ("--limit", "0")),
                        (["--kv", "int9"], ("--synthetic", "1:1:1:1", "--kv", "int9")), (["--speed"], ("--speed", "-1")),
                        (["--synthetic"], ("--synthetic", "1:2:3")), (["--mode", "best"], ("--mode", "best")),
                        (["--sweep"], ("--sweep", "1G,x")), (["--max-gap-ms"], ("--max-gap-ms", "nan")),
                        (["--events"], ("--synthetic", "1:1:1:1", "--events", "x", "--mode", "static")),
                        (["--sweep"], ("--synthetic", "1:1:1:1", "--sweep", "1G", "--mode", "static")),
                        (["--no-chunking"], ("--synthetic", "1:1:1:1", "--no-chunking", "--max-gap-ms", "9"))):
        refused(words, *args, code=2)
    refused(["--model", "7:0:128"], "--synthetic", "1:1:1:1", "--model", "7:0:128")
    refused(["device_bytes"], "--synthetic", "1:1:1:1", "--kv-bytes", "1K")
    refused(["no request"], "--synthetic", "1:100000:1:1", *TINY, "--kv-bytes", "1M")
    out, _ = run("--help")
    assert "belady_hit_rate" in out and "static" in out


if __name__ == "__main__":
    sys.exit(run_functions(globals(), ONLY))
