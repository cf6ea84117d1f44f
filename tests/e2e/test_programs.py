#!/usr/bin/env python3
"""complete and chat as a user runs them: output, errors, exit codes.

usage: test_programs.py [-k WORD] [BUILD_FOLDER [MODEL.gguf]]      -k: only the cases with WORD in their name

Oracles: Python's json and UTF-8 decoder, the vocabulary as the gguf package reads it, and one program against the
other (an answer on reused KV against the same prompt in an empty cache).
"""
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time

from cases import Skip, lavapipe, run_functions

ARGS = sys.argv[1:]
ONLY = ""
if ARGS[:1] == ["-k"]:
    ONLY, ARGS = ARGS[1], ARGS[2:]
BUILD = ARGS[0] if ARGS else "build"
MODEL = ARGS[1] if len(ARGS) > 1 else "build/models/SmolLM2-135M-Instruct.Q4_1.gguf"
SCRATCH = tempfile.TemporaryDirectory()
ESCAPE = "\x1b"


def run(program, *args, stdin=b"", model=MODEL, code=0, stdout=subprocess.PIPE, libraries=None, variables=None):
    """Runs a program; its exit code must be `code`. Returns (stdout bytes, stderr text). libraries: a folder where shared
    libraries are looked for first. variables: of the environment."""
    command = [os.path.join(BUILD, program)] + (["-m", model] if model else []) + list(args)
    env = dict(os.environ, **(variables or {}))
    if libraries:
        env["LD_LIBRARY_PATH"] = libraries
    p = subprocess.run(command, input=stdin, stdout=stdout, stderr=subprocess.PIPE, timeout=120, env=env)
    err = p.stderr.decode()
    assert p.returncode == code, f"{command[1:]}: exit code {p.returncode}, not {code}: {err}"
    return p.stdout, err


def complete(*args, **kw):
    """complete --json, as an object."""
    out, _ = run("complete", "--json", *args, **kw)
    assert out.count(b"\n") == 1, out
    return json.loads(out.decode("utf-8", "strict"))


def refused(program, *args, code, words, **kw):
    """The program must end with `code`, leave stdout empty and have all the words on one line of stderr."""
    out, err = run(program, *args, code=code, **kw)
    assert out == b"", out
    last = err.strip().splitlines()[-1]
    missing = [w for w in words if w not in last]
    assert not missing, f"{args}: {missing} not in {last!r}"
    assert last.startswith(program + ": "), last
    return last


def chat(text, *args, **kw):
    """A conversation from a pipe at temperature 0. Returns (stdout text, stderr text)."""
    out, err = run("chat", "--temp", "0", *args, stdin=text.encode(), **kw)
    assert ESCAPE not in out.decode() and ESCAPE not in err, "colours without a terminal"
    return out.decode(), err


def reuse(err):
    """[(reused, of, reason, new)] for each turn."""
    found = re.findall(r"^reused (\d+) of (\d+) tokens \((.*?)\), (\d+) new", err, re.M)
    return [(int(a), int(b), why, int(n)) for a, b, why, n in found]


def chatml(*messages):
    roles = ["user", "assistant"]
    text = "<|im_start|>system\n" + SYSTEM + "<|im_end|>\n"
    for i, m in enumerate(messages):
        text += f"<|im_start|>{roles[i % 2]}\n{m}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"


SYSTEM = "You answer briefly."
LONG = "The quick brown fox jumps over the lazy dog near the river bank. " * 20


def vocabulary():
    """id -> bytes, by the byte-level alphabet of GPT-2; control tokens (type 3) stand for none."""
    import gguf  # pylint: disable=import-outside-toplevel

    fields = gguf.GGUFReader(MODEL).fields
    field, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    control = [kinds.parts[i][0] == 3 for i in kinds.data]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(b): b for b in printable}
    for n, b in enumerate(b for b in range(256) if b not in printable):
        alphabet[chr(256 + n)] = b
    pieces = [bytes(alphabet[c] for c in bytes(field.parts[i]).decode()) for i in field.data]
    return [b"" if is_control else piece for piece, is_control in zip(pieces, control)]


# ---- complete


def test_json_and_plain_output_agree():
    j = complete("-p", "The capital of France is", "-n", "24")
    keys = {"tokens", "text", "prompt_tokens", "prefill_s", "decode_s", "backend", "kv_bytes", "finish"}
    assert keys <= set(j), keys - set(j)
    assert len(j["tokens"]) == 24 and j["prompt_tokens"] == 5 and j["finish"] == "length", j
    assert j["prefill_s"] > 0 and j["decode_s"] > 0 and j["kv_bytes"] > 0 and j["backend"].startswith("cpu"), j
    out, err = run("complete", "-p", "The capital of France is", "-n", "24")
    assert out.decode() == j["text"], (out, j["text"])
    assert "5 prompt tokens" in err and "Paris" in j["text"], (err, j["text"])


def no_driver():
    """A folder with a CUDA driver and a Vulkan loader that cannot be loaded."""
    folder = os.path.join(SCRATCH.name, "no_driver")
    os.makedirs(folder, exist_ok=True)
    for name in "libcuda.so.1", "libvulkan.so.1", "libvulkan.so":
        with open(os.path.join(folder, name), "w", encoding="ascii") as f:
            f.write("no library")
    return folder


def test_backends():
    prompt = ("-p", "The capital of France is", "-n", "8")
    want, err = run("complete", *prompt, "--backend", "cpu")
    assert re.search(r"^complete: backend cpu \(\w+\)$", err, re.M), err
    out, err = run("complete", *prompt, "--backend=auto", libraries=no_driver())
    assert out == want, out
    assert re.search(r"^complete: backend cpu \(\w+\); cuda: .*libcuda.*; vulkan: .*libvulkan", err, re.M), err
    last = refused("complete", *prompt, "--backend", "cuda", code=1, words=["cuda", "libcuda"], libraries=no_driver())
    assert len(last) > 30, last
    refused("complete", *prompt, "--backend", "vulkan", code=1, words=["vulkan", "libvulkan"], libraries=no_driver())
    for program in "complete", "chat":
        refused(program, "--backend", "gpu", code=2, words=["--backend", "'gpu'", "auto", "cuda", "vulkan", "cpu"])
        refused(program, "--device", "-1", code=2, words=["--device", "'-1'"])
    _, err = run("chat", "--backend", "cpu", stdin=b"/quit\n")
    assert re.search(r"backend cpu \(\w+\)$", err, re.M), err
    refused("chat", "--backend", "cuda", code=1, words=["libcuda"], libraries=no_driver())


def test_cuda_through_the_mock_driver():
    mock = os.path.abspath(os.path.join(BUILD, "mock_cuda"))
    if not os.path.exists(os.path.join(mock, "libcuda.so.1")):
        raise Skip("make mock-cuda builds the driver that this needs")
    for kv in "int8", "int4":  # the tokens after a block of 32 read what the kernels have sealed
        prompt = ("-p", "The capital of France is Paris. " * 6, "-n", "4", "--kv", kv)
        want = complete(*prompt, "--backend", "cpu")
        got = complete(*prompt, "--backend", "cuda", libraries=mock)
        assert got["backend"].startswith("cuda"), got
        assert got["tokens"] == want["tokens"], (kv, got, want)
    out, err = run("complete", *prompt, "--backend", "auto", libraries=mock)
    assert re.search(r"^complete: backend cuda", err, re.M) and out.decode() == want["text"], (err, out)
    # what CUDA has not and nobody asked for by name goes to the CPU, and that is said
    odd = ("-p", "x", "-n", "2", "--kv-k", "int8", "--kv-v", "fp8_e4m3")
    refused("complete", *odd, "--backend", "cuda", code=1, words=["cuda"], libraries=mock)
    _, err = run("complete", *odd, libraries=mock)
    assert re.search(r"^complete: backend cpu \(\w+\); cuda.*: ", err, re.M), err


def test_vulkan_through_lavapipe():
    only = lavapipe(BUILD)
    for kv in "int8", "int4":  # the tokens after a block of 32 read what the shaders have sealed
        prompt = ("-p", "The capital of France is Paris. " * 6, "-n", "6", "--kv", kv)
        want = complete(*prompt, "--backend", "cpu")
        got = complete(*prompt, "--backend", "vulkan", variables=only)
        assert got["backend"].startswith("vulkan") and "llvmpipe" in got["backend"], got
        assert got["tokens"] == want["tokens"], (kv, got, want)
    short = ("-p", "x", "-n", "2")
    assert complete(*short, "--backend", "vulkan", "--device", "0", variables=only)["backend"] == got["backend"]
    refused("complete", *short, "--backend", "vulkan", "--device", "7", code=1, words=["vulkan", "device"], variables=only)
    # auto takes no driver that runs on the CPU, and says so
    _, err = run("complete", *short, libraries=None, variables=only)
    assert re.search(r"^complete: backend cpu \(\w+\); .*vulkan: .*llvmpipe", err, re.M), err
    # what Vulkan has not and was asked for by name is refused
    refused("complete", *short, "--kv-k", "int8", "--kv-v", "fp8_e4m3", "--backend", "vulkan", code=1, words=["vulkan"], variables=only)


def test_text_is_what_the_tokens_stand_for():
    pieces = vocabulary()
    broken = 0
    for seed in range(4):  # at this temperature tokens are as good as random: many hold parts of characters
        j = complete("-p", "x", "-n", "300", "--temp", "100", "--seed", str(seed))
        data = b"".join(pieces[i] for i in j["tokens"])
        assert j["text"] == data.decode("utf-8", "replace"), seed
        broken += "\ufffd" in j["text"]
    assert broken, "no token sequence was invalid UTF-8: this shows nothing"


def test_prompt_from_file_and_stdin():
    name = os.path.join(SCRATCH.name, "prompt")
    with open(name, "w", encoding="utf-8") as f:
        f.write("The capital of France is")
    want = complete("-p", "The capital of France is", "-n", "6")["tokens"]
    assert complete("-f", name, "-n", "6")["tokens"] == want
    assert complete("-f", "-", "-n", "6", stdin=b"The capital of France is")["tokens"] == want
    assert complete("--file=" + name, "-n", "6")["tokens"] == want
    assert complete("-p", "The capital of Spain is", "-n", "6")["tokens"] != want


def test_answer_does_not_depend_on_threads():
    for act in "int8", "f32":
        one = complete("-p", LONG, "-n", "16", "--threads", "1", "--act", act)
        two = complete("-p", LONG, "-n", "16", "--threads", "2", "--act", act)
        assert one["tokens"] == two["tokens"], act


def test_seed_decides():
    a, b, c = (complete("-p", "Once", "-n", "24", "--temp", "1", "--seed", s)["tokens"] for s in ("7", "7", "8"))
    assert a == b and a != c
    greedy = complete("-p", "Once", "-n", "24")["tokens"]
    assert complete("-p", "Once", "-n", "24", "--temp", "1", "--top-k", "1")["tokens"] == greedy
    assert complete("-p", "Once", "-n", "24", "--temp", "1", "--min-p", "1")["tokens"] == greedy
    assert complete("-p", "Once", "-n", "24", "--temp", "1", "--top-p", "0.0001")["tokens"] == greedy


def test_stops_at_an_end_token():
    j = complete("-p", chatml("Say hello."), "-n", "100")
    assert j["finish"] == "stop" and 1 <= len(j["tokens"]) < 100, j
    assert "<|im_end|>" not in j["text"] and j["text"], j


def test_zero_and_one_new_tokens():
    j = complete("-p", "Hello", "-n", "0")
    assert j["tokens"] == [] and j["text"] == "" and j["prompt_tokens"] == 1 and j["prefill_s"] > 0, j
    assert run("complete", "-p", "Hello", "-n", "0")[0] == b""
    assert len(complete("-p", "Hello", "-n", "1")["tokens"]) == 1


def test_formats_of_kv():
    size = {}
    for kv in "f32", "f16", "bf16", "int8", "int8+", "fp8", "nvfp4", "balanced", "int4":
        j = complete("-p", LONG, "-n", "8", "--kv", kv)
        assert len(j["tokens"]) == 8, kv
        size[kv] = j["kv_bytes"]
    assert size["f32"] == 2 * size["f16"] == 2 * size["bf16"], size
    assert size["f16"] > 1.6 * size["int8"] and size["int8"] > 1.4 * size["int4"], size
    mixed = complete("-p", LONG, "-n", "8", "--kv-k", "int8", "--kv-v", "int4+rot")["kv_bytes"]
    assert size["int4"] < mixed < size["int8"], (mixed, size)
    both = complete("-p", LONG, "-n", "8", "--kv-k", "f32", "--kv-v", "f32")
    assert both["kv_bytes"] == size["f32"], "open blocks of an all-f32 cache are f32 too"


def test_default_budget_just_holds_the_text_and_the_error_says_how_much():
    for n_new in "1", "200":
        last = refused("complete", "-p", LONG, "-n", n_new, "--kv-bytes", "100K", code=1, words=["102400", "MiB"])
        need = int(re.search(r"it takes (\d+)", last)[1])
        j = complete("-p", LONG, "-n", n_new, "--kv-bytes", str(need))
        assert need > j["kv_bytes"] > 0, (need, j["kv_bytes"])
        refused("complete", "-p", LONG, "-n", n_new, "--kv-bytes", str(need * 24 // 25), code=1, words=["it takes"])


def test_usage_errors():
    wrong = [
        (["-p", "x", "--frob"], ["--frob"]),
        (["-p", "x", "frob"], ["frob"]),
        (["-p"], ["-p", "value"]),
        (["-p", ""], ["empty"]),
        ([], ["-p", "-f"]),
        (["-p", "x", "-f", "y"], ["-p", "-f"]),
        (["-p", "x", "-n", "-1"], ["-n", "-1"]),
        (["-p", "x", "-n", "1x"], ["-n", "1x"]),
        (["-p", "x", "-n", "99999999999999999999999"], ["-n"]),
        (["-p", "x", "--temp", "hot"], ["--temp", "hot"]),
        (["-p", "x", "--temp", "nan"], ["--temp"]),
        (["-p", "x", "--temp", "-1"], ["--temp"]),
        (["-p", "x", "--top-p", "2"], ["--top-p"]),
        (["-p", "x", "--min-p", "-0.5"], ["--min-p"]),
        (["-p", "x", "--top-k", "1.5"], ["--top-k"]),
        (["-p", "x", "--kv", "int3"], ["--kv", "int3", "int8", "balanced"]),
        (["-p", "x", "--kv-k", "int3"], ["--kv-k", "int3", "int4_channel"]),
        (["-p", "x", "--kv-bytes", "1T"], ["--kv-bytes", "1T"]),
        (["-p", "x", "--kv-bytes", "0"], ["--kv-bytes"]),
        (["-p", "x", "--kv-bytes", "99999999999G"], ["--kv-bytes"]),
        (["-p", "x", "--threads", "0"], ["--threads"]),
        (["-p", "x", "--act", "f16"], ["--act", "f16", "int8"]),
        (["-p", "x", "--json=yes"], ["--json"]),
    ]
    for args, words in wrong:
        refused("complete", *args, code=2, words=words)
    refused("complete", "-p", "x", model=None, code=2, words=["-m"])
    refused("chat", model=None, code=2, words=["-m"])
    refused("chat", "--kv", "int3", code=2, words=["--kv", "int3"])
    refused("chat", "-n", "0", code=2, words=["-n"])


def test_help():
    for program in "complete", "chat":
        out, err = run(program, "--help", model=None)
        assert b"usage: " + program.encode() in out and b"--kv-bytes" in out and err == "", out


def test_runtime_errors():
    refused("complete", "-p", "x", model="/nonexistent.gguf", code=1, words=["/nonexistent.gguf"])
    refused("complete", "-p", "x", model=".", code=1, words=["."])
    refused("complete", "-p", "x", model="Makefile", code=1, words=["GGUF"])
    refused("complete", "-f", "/nonexistent", code=1, words=["-f", "/nonexistent"])
    refused("complete", "-f", "-", code=1, words=["empty"])
    refused("complete", "-p", "x", "--kv-v", "int8_channel", "-n", "1", code=1, words=["int8_channel", "v_format"])
    refused("chat", model="/nonexistent.gguf", code=1, words=["/nonexistent.gguf"])
    with open("/dev/full", "wb") as full:
        _, err = run("complete", "-p", "x", "-n", "4", code=1, stdout=full)
        assert "stdout" in err, err


def test_prompt_longer_than_the_context():
    last = refused("complete", "-f", "-", stdin=b"word " * 9000, code=1, words=["8192", "context"])
    assert int(re.search(r"has (\d+) tokens", last)[1]) >= 9000, last


def patched(find, change, size=None):
    """A copy of the model with the bytes after `find` changed, cut to `size`."""
    with open(MODEL, "rb") as f:
        data = bytearray(f.read(size if size else -1))
    at = data.index(find) + len(find)
    change(data, at)
    name = os.path.join(SCRATCH.name, "patched.gguf")
    with open(name, "wb") as f:
        f.write(data)
    return name


def test_unknown_architecture_and_small_context():
    def rename(data, at):  # type 8, length, "llama"
        assert data[at + 12 : at + 17] == b"llama"
        data[at + 12 : at + 17] = b"mamba"

    def context(data, at):  # type 4, u32
        data[at + 4 : at + 8] = struct.pack("<I", 48)

    refused("complete", "-p", "x", model=patched(b"general.architecture", rename), code=1, words=["mamba", "llama"])
    small = patched(b"llama.context_length", context)
    refused("complete", "-p", LONG, model=small, code=1, words=["48"])
    out, err = run("complete", "--json", "-p", "The capital of France is", "-n", "100", model=small)
    assert "lowered to the 44" in err, err
    j = json.loads(out)
    assert len(j["tokens"]) == 44, len(j["tokens"])
    _, err = chat("Tell me a long story about a cat.\nMore.\n/undo\n/undo\n/help\n", model=small)
    assert "is full: 48 tokens" in err and "/undo" in err, err
    refused("chat", "--system", LONG, model=small, code=1, words=["48", "system"])


def test_truncated_models():
    for part in 0.0, 1e-6, 0.01, 0.5, 0.999:
        size = int(os.path.getsize(MODEL) * part)
        name = os.path.join(SCRATCH.name, "truncated.gguf")
        with open(MODEL, "rb") as f, open(name, "wb") as g:
            g.write(f.read(size))
        _, err = run("complete", "-p", "x", model=name, code=1)
        assert len(err.splitlines()) == 1 and len(err) > 20, err


# ---- chat


def test_turns_reuse_all_that_was_computed():
    _, err = chat("Hello!\nName a colour.\nAnother one.\n", "--system", SYSTEM)
    turns = reuse(err)
    assert len(turns) == 3 and turns[0][0] == 0, err
    for before, after in zip(turns, turns[1:]):  # the last token of an answer has no KV yet
        assert after[0] == before[1] + before[3] - 1, (before, after)
        assert after[1] > after[0], after


def test_reused_kv_gives_the_answer_of_a_fresh_cache():
    questions = ["What is the capital of Italy?", "And of Spain? Tell me about the city."]
    for kv in "int8", "int4":
        first = complete("-p", chatml(questions[0]), "-n", "300", "--kv", kv)["text"]
        second = complete("-p", chatml(questions[0], first, questions[1]), "-n", "300", "--kv", kv)["text"]
        out, err = chat("\n".join(questions) + "\n", "--system", SYSTEM, "--kv", kv, "-n", "300")
        assert out == first + "\n" + second + "\n", (kv, out, first, second)
        assert reuse(err)[1][0] > 0, err


def test_undo_takes_back_and_the_same_question_gets_the_same_answer():
    ask = "What is your favourite animal?\n"
    out, err = chat("Hello!\n" + ask + "/undo\n" + ask + "/undo\n/undo\n/undo\n", "--system", SYSTEM)
    _, a, b = (t for t in reuse(err))
    answer = out[len(out) // 2 :]
    assert out.count(answer) >= 1 and a[1] == b[1] and a[3] == b[3], err
    hello, rest = out.split("\n", 1)
    assert hello and len(rest) % 2 == 0 and rest[: len(rest) // 2] == rest[len(rest) // 2 :], out
    assert b[0] > 0 and "there is no exchange to drop" in err, err


def test_fork_and_switch():
    ask = "Name a fruit.\n"
    out, err = chat("Hello!\n/fork\n" + ask + "/switch 1\n" + ask + "/switch 3\n/switch\n/switch 0\n/fork\n/stats\n",
                    "--system", SYSTEM)
    _, a, b = reuse(err)
    assert a[1] == b[1] and a[3] == b[3], err
    hello, rest = out.split("\n", 1)
    assert hello and rest[: len(rest) // 2] == rest[len(rest) // 2 :], out
    assert err.count("there are branches 1 to 2") == 3, err
    assert re.search(r"branch 3 .*here", err) and not re.search(r"branch [12] .*here", err), err


def test_system_message_and_messages_of_several_lines():
    _, err = chat("Hello!\n/system Speak like a king.\nHello!\n/system\n", "--system", SYSTEM)
    a, b = reuse(err)
    assert b[0] < b[1] - 20 and "differ at" in b[2], err
    assert "system message: Speak like a king." in err and "the model's own" in err, err
    _, one = chat("Hello there\n/undo\nHello \\\nthere\n/undo\n\n   \nx\\", "--system", SYSTEM)
    turns = reuse(one)
    assert len(turns) == 3 and turns[1][1] > turns[0][1], one  # a line break is one token more


def test_commands_and_stats():
    _, err = chat("/stats\n/frob\n/undoes\nHi\n/stats\n/help\n/quit\nnever read\n", "--system", SYSTEM)
    assert "'/frob' is no command" in err and "'/undoes' is no command" in err, err
    assert len(reuse(err)) == 1, err
    assert re.search(r"KV memory .* MiB budget", err) and "/switch N" in err, err


def test_a_full_conversation_is_no_crash():
    last = refused("chat", "--kv-bytes", "64K", code=1, words=["256 tokens", "it takes"])
    need = re.search(r"it takes (\d+)", last)[1]
    lines = "Tell me about the history of Rome in detail.\n" * 6
    _, err = chat(lines + "/undo\n/undo\nHi\n/stats\n", "--kv-bytes", need, "--system", SYSTEM)
    assert "the conversation is full" in err or "/undo drops the last exchange" in err, err
    assert "KV memory" in err, err


def test_very_long_line():
    out, err = chat("word " * 20000 + "\nHi\n", "--system", SYSTEM)
    assert "8192 is the most" in err and len(reuse(err)) == 1 and out, err


class Terminal:
    """A program on a pseudo terminal."""

    def __init__(self, *command):
        try:
            self.pid, self.fd = pty.fork()
        except OSError as why:  # a bare chroot has no /dev/pts
            raise Skip(f"no pseudo-terminal to be had here: {why}") from why
        if self.pid == 0:
            os.execv(command[0], command)
        self.seen = ""

    def wait_for(self, pattern, seconds=60):
        """Reads until the pattern is in what came since the last call."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.seen):
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.fd, 4096).decode("utf-8", "replace")
                except OSError:
                    raise AssertionError(f"it ended before {pattern!r}: {self.seen!r}") from None
        seen, self.seen = self.seen, ""
        return seen

    def send(self, text):
        os.write(self.fd, text.encode())

    def status(self):
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try:
                if select.select([self.fd], [], [], 0.1)[0]:
                    os.read(self.fd, 4096)
            except OSError:
                pass
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return status
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError("it does not end")


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves():
    t = Terminal(os.path.join(BUILD, "chat"), "-m", MODEL, "--temp", "0")
    assert ESCAPE in t.wait_for("> ")
    t.send("Write a very long story about the sea.\n")
    t.wait_for(r"sea\.\r\n(?s:.){40}")
    t.send("\x03")
    stopped = t.wait_for(r"stopped(?s:.)*> ")
    new = int(re.search(r"(\d+) new", stopped)[1])
    assert 0 < new < 512, stopped
    t.send("Hello again.\n")
    turn = reuse(t.wait_for(r"reused(?s:.)*> ").replace("\x1b[2m", "").replace("\r", ""))[0]
    assert turn[0] >= new, turn  # what was said before it was stopped counts
    t.send("half a line\x03")
    t.wait_for(r"leaves(?s:.)*> ")
    t.send("\x03")
    t.wait_for(r"leaves(?s:.)*> ")
    t.send("\x04")
    assert t.status() == 0


if __name__ == "__main__":
    sys.exit(run_functions(globals(), ONLY))
