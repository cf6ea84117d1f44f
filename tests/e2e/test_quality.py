#!/usr/bin/env python3
"""tools/quality: its counting against numpy, its figures on a text against bounds, and what it refuses.

usage: test_quality.py [-v] [CASE...]

Oracles: the logits of the runner (dump_logits) and of reference_model.py, with perplexity, divergence, quantiles and
bits computed here in double precision.
"""
import json
import os
import subprocess
import sys
import tempfile

import test_logits  # first: where Python packages are missing, it says so and ends the run as skipped
import numpy as np
from cases import Skip, run_methods
from reference_model import ReferenceModel, log_softmax
from test_logits import BUILD, MODEL, TEXT, WIKITEXT, check, say

QUALITY = os.path.join(BUILD, "quality")
COMPLETE = os.path.join(BUILD, "complete")
CTX = 256

# Mean KLD on the first chunk of 512 of WikiText-2; what was measured is about half of it.
BOUNDS = {"f16": 1e-6, "bf16": 4e-5, "int8+": 4e-5, "int8": 2.4e-4, "balanced": 0.0016, "fp8": 0.0024, "int4": 0.008,
          "nvfp4": 0.02}
IN_ORDER = ["f16", "int8+", "int8", "balanced", "int4", "nvfp4"]


def close(a, b, relative, absolute=0.0):
    return abs(a - b) <= relative * abs(b) + absolute


class Tests:
    def __init__(self, files):
        self.files = files
        self.text = files.write(TEXT.encode())
        self.tokens = files.encode(TEXT)
        check(len(self.tokens) >= 2 * CTX, f"the text has only {len(self.tokens)} tokens")

    def quality(self, *options, text=None):
        """The rows of --json by name."""
        command = [QUALITY, "-m", MODEL, "-f", text or self.text, "--json", *map(str, options)]
        rows = json.loads(test_logits.run(*command))
        by_name = {row["kv"]: row for row in rows}
        check(len(by_name) == len(rows), f"a row twice: {[row['kv'] for row in rows]}")
        return by_name

    def log_probs(self, tokens, kv):
        """Of the runner, what the second half but the last predicts."""
        n_vocab = 49152
        logits = self.files.logits(tokens, n_vocab, "--act", "f32", "--kv", kv, "--from", len(tokens) // 2)
        return log_softmax(logits[:-1])

    def check_row(self, row, reference, tested, following):
        """A row against what numpy makes of the log-probabilities of both caches."""
        nll = -tested[np.arange(len(following)), following]
        kld = (np.exp(reference) * (reference - tested)).sum(axis=-1)
        same = (reference.argmax(axis=-1) == tested.argmax(axis=-1)).mean()
        base = -reference[np.arange(len(following)), following]
        want = {"ppl": np.exp(nll.mean()), "dppl_percent": 100 * (np.exp(nll.mean() - base.mean()) - 1),
                "kld_mean": kld.mean(), "kld_p99": np.quantile(kld, 0.99), "kld_p999": np.quantile(kld, 0.999),
                "top1_percent": 100 * same, "predictions": len(following)}
        for key, value in want.items():
            check(close(row[key], value, 1e-7, 1e-10), f"{row['kv']}: {key} is {row[key]}, not {value}")

    def test_counting_against_numpy(self):
        """Two chunks: what is counted, and what is made of it."""
        rows = self.quality("--ctx", CTX, "--chunks", 2, "--whole", "--kv", "int4", "--kv", "nvfp4")
        check(list(rows) == ["f32", "int4", "nvfp4"], f"the rows are {list(rows)}")
        chunks = [self.tokens[:CTX], self.tokens[CTX:2 * CTX]]
        following = np.concatenate([c[CTX // 2 + 1:] for c in chunks])
        check(len(following) == 2 * (CTX // 2 - 1), "the test counts wrong")
        reference = np.concatenate([self.log_probs(c, "f32") for c in chunks])
        for kv, row in rows.items():
            tested = np.concatenate([self.log_probs(c, kv) for c in chunks])
            self.check_row(row, reference, tested, following)
            check((row["ctx"], row["chunks"], row["act"]) == (CTX, 2, "f32"), f"{row}")

    def test_perplexity_against_reference_model(self):
        chunk = self.tokens[:CTX]
        log_probs = ReferenceModel(MODEL).log_probs(chunk, first_row=CTX // 2)[:-1]
        want = np.exp(-log_probs[np.arange(CTX // 2 - 1), chunk[CTX // 2 + 1:]].mean())
        got = self.quality("--ctx", CTX, "--chunks", 1, "--whole", "--kv", "f32")["f32"]["ppl"]
        say(f"perplexity {got:.6f}, of the reference {want:.6f}")
        check(close(got, want, 1e-5), f"perplexity {got}, of the reference {want}")

    def test_equal_caches_do_not_diverge(self):
        rows = self.quality("--ctx", 128, "--whole", "--kv", "f32/f32", "--chunks", 2)
        row = rows["f32/f32"]
        check((row["kld_mean"], row["kld_p999"], row["dppl_percent"], row["top1_percent"]) == (0, 0, 0, 100), f"{row}")
        check(row["ppl"] == rows["f32"]["ppl"], f"{row}")

    def test_a_chunk_starts_with_bos_where_the_model_wants_one(self):
        with open(MODEL, "rb") as f:
            data = bytearray(f.read())
        key = b"tokenizer.ggml.add_bos_token"
        at = data.index(key) + len(key) + 4  # a type of 4 bytes, then the flag
        check(data[at] == 0, "the model wants a BOS itself")
        data[at] = 1
        model = self.files.write(bytes(data))
        text = ["-f", self.text, "--json", "--ctx", "128", "--chunks", "2", "--whole", "--kv", "f32"]
        row = json.loads(test_logits.run(QUALITY, "-m", model, *text))[0]
        os.unlink(model)
        bos, nll = 1, []
        tokens = np.concatenate([[bos], self.tokens])  # the text, too, is tokenised with it
        for chunk in tokens[:128].copy(), tokens[128:256].copy():
            chunk[0] = bos
            nll.append(-self.log_probs(chunk, "f32")[np.arange(63), chunk[65:]])
        want = np.exp(np.concatenate(nll).mean())
        check(close(row["ppl"], want, 1e-7), f"perplexity {row['ppl']}, not {want}")

    def test_bits(self):
        """By the layouts: 255 tokens in 8 blocks of 32, the first and the open one in F16; rows of 64 numbers."""
        f16 = 32 * 64 * 2
        packed = {"int8": (2176, 2176),  # 2048 and 32 scales, up to a multiple of 128
                  "int4": (1280, 1152),  # 1024 and 64 scales and zeros; 1024 and 32 of each
                  "nvfp4": (1152, 1152), "f16": (f16, f16)}
        rows = self.quality("--ctx", CTX, "--chunks", 1, *[o for kv in packed for o in ("--kv", kv)])
        numbers = 255 * 64
        for kv, sides in packed.items():
            k, v = ((6 * side + 2 * f16) * 8 / numbers for side in sides)
            row = rows[kv]
            for key, want in ("k_bits", k), ("v_bits", v), ("bits", (k + v) / 2):
                check(close(row[key], want, 1e-9), f"{kv}: {key} is {row[key]}, not {want}")
        check(rows["int4 keys only"]["k_bits"] == rows["int4"]["k_bits"], "keys only")
        check(rows["int4 keys only"]["v_bits"] == rows["f16"]["v_bits"], "keys only")
        check(rows["int4 values only"]["k_bits"] == rows["f16"]["k_bits"], "values only")
        check("f16 keys only" not in rows, "F16 apart is F16")
        for kv in "int8", "int4", "nvfp4":
            keys, values = rows[kv + " keys only"]["kld_mean"], rows[kv + " values only"]["kld_mean"]
            check(rows["f16"]["kld_mean"] < values < keys, f"{kv}: keys {keys}, values {values}")

    def test_presets_on_a_text(self):
        if not os.path.exists(WIKITEXT):
            raise Skip(f"{WIKITEXT} is not there")
        rows = self.quality("--ctx", 512, "--chunks", 1, "--whole", text=WIKITEXT)
        check(set(rows) == set(BOUNDS) | {"f32"}, f"the rows are {list(rows)}")
        for kv, bound in BOUNDS.items():
            kld = rows[kv]["kld_mean"]
            say(f"{kv:9} KLD {kld:.3g}, bound {bound:g}, {rows[kv]['bits']:.2f} bits")
            check(0 < kld <= bound, f"mean KLD {kld:.3g} of {kv} is above {bound:g}")
        for better, worse in zip(IN_ORDER, IN_ORDER[1:]):
            check(rows[better]["kld_mean"] < rows[worse]["kld_mean"], f"{better} is not better than {worse}")

    def test_facts_are_found(self):
        if not os.path.exists(WIKITEXT):
            raise Skip(f"{WIKITEXT} is not there")
        rows = self.quality("--retrieval", "--ctx", 1024, "--chunks", 1, "--kv", "int8", text=WIKITEXT)
        for kv in "f32", "int8":
            say(f"{kv}: {rows[kv]}")
            check(rows[kv]["asked"] == 16 and rows[kv]["recall_percent"] >= 75, f"{rows[kv]}")
        check(rows["f32"]["same_percent"] == 100, f"{rows['f32']}")

    def test_layers_and_assignment(self):
        """The file that is written must be, as --kv FILE, the cache that was measured."""
        path = self.files.write(b"")
        study = json.loads(test_logits.run(QUALITY, "-m", MODEL, "-f", self.text, "--per-layer", "--ctx", "96",
                                           "--chunks", "1", "--bits", "13.2", "--out", path, "--json"))
        probes = {(p["layer"], p["side"], p["format"]): p["kld_mean"] for p in study["probes"]}
        check(len(probes) == 30 * 5, f"{len(probes)} probes")
        four = [probes[(layer, "k", "int4_channel")] for layer in range(30)]
        eight = [probes[(layer, "k", "int8_channel")] for layer in range(30)]
        check(sum(four) > 5 * max(sum(eight), 0), f"keys in 4 bits cost {sum(four)}, in 8 bits {sum(eight)}")
        caches = {c["kv"]: c for c in study["caches"]}
        mine = caches["assignment"]
        check(caches["int4"]["bits"] < mine["bits"] <= 13.2, f"{mine['bits']} bits, int4 {caches['int4']['bits']}")
        check(mine["kld_mean"] < caches["int4"]["kld_mean"], f"{caches}")
        row = self.quality("--ctx", 96, "--chunks", 1, "--whole", "--kv", path)[path]
        check(close(row["kld_mean"], mine["kld_mean"], 1e-9) and close(row["bits"], mine["bits"], 1e-9),
              f"{row} is not {mine}")
        answer = json.loads(test_logits.run(COMPLETE, "-m", MODEL, "-p", "The capital of France is", "-n", "4", "--json",
                                            "--kv", path))
        check(answer["text"].startswith(" Paris"), f"{answer}")

    def refused(self, words, *options, program=QUALITY, code=1):
        p = subprocess.run([program, *options], capture_output=True, check=False)
        line = p.stderr.decode().strip().splitlines()[-1]
        check(p.returncode == code, f"{options}: status {p.returncode}, not {code}: {line}")
        check(p.stdout == b"", f"{options}: {p.stdout}")
        missing = [w for w in words if w not in line]
        check(not missing, f"{options}: {missing} not in {line!r}")

    def test_wrong_usage(self):
        model, text = ["-m", MODEL], ["-f", self.text]
        wrong = [
            ([*text], ["-m"]),
            ([*model], ["-f"]),
            ([*model, *text, "--ctx", "511"], ["--ctx 511", "even"]),
            ([*model, *text, "--ctx", "0"], ["--ctx", "0"]),
            ([*model, *text, "--ctx", "2"], ["--ctx 2", "4 or more"]),
            ([*model, *text, "--chunks", "0"], ["--chunks"]),
            ([*model, *text, "--frob"], ["--frob"]),
            ([*model, *text, "--temp", "1"], ["--temp"]),
            ([*model, *text, "--per-layer", "--retrieval"], ["--per-layer", "--retrieval"]),
            ([*model, *text, "--bits", "6"], ["--per-layer"]),
            ([*model, *text, "--per-layer", "--out", "x"], ["--bits"]),
            ([*model, *text, "--per-layer", "--kv", "int4"], ["--kv"]),
            ([*model, *text, "--act", "f16"], ["--act", "f16"]),
        ]
        for options, words in wrong:
            self.refused(words, *options, code=2)

    def test_wrong_input(self):
        model, text = ["-m", MODEL], ["-f", self.text]
        override = self.files.write(b"preset int4\nlayer 0 k=int8\nlayer 30 k=int8\n")
        short, empty = self.files.write(b"A few words."), self.files.write(b"")
        wrong = [
            ([*model, "-f", "/nonexistent"], ["-f", "/nonexistent"]),
            ([*model, "-f", "/tmp"], ["-f", "/tmp"]),
            ([*model, "-f", empty], [empty, "empty"]),
            ([*model, "-f", self.files.write(b"one\ntwo\x00\n" * 900)], [":2:", "NUL"]),
            ([*model, "-f", self.files.write(b"one\n\ntwo \xff three\n" * 900)], [":3:", "0xff", "UTF-8"]),
            ([*model, "-f", short], [short, "less than a chunk of 1024"]),
            ([*model, *text, "--ctx", "8194"], ["--ctx 8194", "8192"]),
            ([*model, *text, "--ctx", "64", "--kv", "int3"], ["--kv", "int3", "balanced"]),
            ([*model, *text, "--ctx", "64", "--kv", "int8/int3"], ["int8/int3"]),
            ([*model, *text, "--ctx", "64", "--kv", "int8/int8_channel"], ["int8_channel"]),
            ([*model, *text, "--ctx", "64", "--kv", override], [override + ":3:", "30 layers"]),
            ([*model, *text, "--ctx", "256", "--retrieval"], ["--ctx 256"]),
            ([*model, *text, "--ctx", "64", "--per-layer", "--bits", "4"], ["--bits 4", "at least"]),
            (["-m", "/nonexistent.gguf", *text], ["/nonexistent.gguf"]),
        ]
        for options, words in wrong:
            self.refused(words, *options)
        self.refused([override + ":3:"], "-m", MODEL, "-p", "x", "--kv", override, program=COMPLETE)


def main():
    if not os.path.exists(MODEL):
        print(f"SKIP: {MODEL} is not there (make model)")
        sys.exit(77)
    with tempfile.TemporaryDirectory() as folder:
        tests = Tests(test_logits.Files(folder))
        sys.exit(run_methods(tests, [name for name in sys.argv[1:] if name != "-v"]))


if __name__ == "__main__":
    main()
