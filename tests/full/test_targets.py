#!/usr/bin/env python3
"""What kvlite set out to reach on the whole traces and texts, where no clock is involved: `make test-full`. Each check runs a tool as
BENCHMARKS.md does and holds its figure to the target."""

import json
import os
import subprocess
import sys
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = os.environ.get("BUILD", "build")
DATA = os.environ.get("DATA", "../shared/data")
MODEL = "build/models/SmolLM2-135M-Instruct.Q4_1.gguf"
AZURE, MOONCAKE, WIKITEXT = (os.path.join(DATA, f) for f in
                             ("azure_conv_2023.csv", "mooncake_conversation.jsonl", "wikitext2_test.txt"))


def run(*argv):
    done = subprocess.run([os.path.join(BUILD, argv[0]), *argv[1:], "--json"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{' '.join(argv)}: status {done.returncode}: {done.stderr[-400:]}")
    return json.loads(done.stdout)


class Traces(unittest.TestCase):
    def test_azure_f16(self):
        c = run("trace", "--trace", AZURE, "--kv", "f16")["continuous"]
        self.assertLessEqual(c["waste"], 0.02)
        self.assertGreaterEqual(c["of_ideal"], 0.9)
        self.assertGreaterEqual(c["requests_within_bound"], 0.99)
        self.assertLessEqual(c["waiting_record_bytes"], 1024)

    def test_azure_int4(self):
        c = run("trace", "--trace", AZURE, "--kv", "int4")["continuous"]
        self.assertLessEqual(c["waste"], 0.05)
        self.assertGreaterEqual(c["of_ideal"], 0.9)

    def test_mooncake(self):
        c = run("trace", "--trace", MOONCAKE)["continuous"]
        self.assertGreaterEqual(c["of_ideal"], 0.9)
        self.assertGreaterEqual(c["requests_within_bound"], 0.99)

    def test_hit_rate(self):
        sizes = run("trace", "--trace", MOONCAKE, "--speed", "inf", "--limit", "4000", "--sweep", "8G,32G,128G,512G,1024G")["sweep"]
        for s in sizes:
            self.assertGreaterEqual(s["hit_rate"], s["lru_hit_rate"], s)
            self.assertLessEqual(s["hit_rate"], s["belady_hit_rate"] + 1e-9, s)


class Quality(unittest.TestCase):
    def test_divergence(self):
        bounds = {"int8": 0.0002, "balanced": 0.0012, "int4": 0.005, "nvfp4": 0.012}
        presets = [a for kv in ("f32", *bounds) for a in ("--kv", kv)]
        rows = {r["kv"]: r for r in run("quality", "-m", MODEL, "-f", WIKITEXT, "--chunks", "8", "--whole", *presets)}
        for kv, bound in bounds.items():
            self.assertLessEqual(rows[kv]["kld_mean"], bound, kv)
            self.assertGreater(rows[kv]["kld_mean"], 0, kv)


if __name__ == "__main__":
    missing = [f for f in (AZURE, MOONCAKE, WIKITEXT) if not os.path.exists(os.path.join(ROOT, f))]
    if missing:
        print(f"SKIP: {', '.join(missing)}: not there (DATA= names the folder)")
        sys.exit(77)
    unittest.main(verbosity=2)
