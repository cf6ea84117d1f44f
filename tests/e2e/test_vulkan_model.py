#!/usr/bin/env python3
"""A real model on the Vulkan backend, through Mesa's lavapipe: test_logits.py's checks against the numpy model, and the
demo's eight conversations against those that it holds on the CPU.

usage: test_vulkan_model.py [BUILD_FOLDER]

With float activations and a float32 cache both backends say the same, token for token. (With int8 activations, which the
programs take by default, and in formats of few bits, a last bit of difference sometimes makes another code, and a token
that leads by little is then another one: test_logits.py bounds what that costs.)
"""
import json
import os
import subprocess
import sys

from cases import Skip, lavapipe, run_functions

BUILD = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("BUILD", "build")
MODEL = "build/models/SmolLM2-135M-Instruct.Q4_1.gguf"
HERE = os.path.dirname(os.path.abspath(__file__))


def test_logits_and_text():
    lavapipe(BUILD)
    done = subprocess.run([sys.executable, os.path.join(HERE, "test_logits.py"), "-v", "--backend", "vulkan",
                           "test_float_logits", "test_presets", "test_greedy_text"], check=False)
    if done.returncode == 77:
        raise Skip("see above")
    assert done.returncode == 0, f"status {done.returncode}"


def demo(backend):
    done = subprocess.run([os.path.join(BUILD, "demo"), "--quick", "--json", "--act", "f32", "--kv", "f32", "--backend", backend],
                          env={**os.environ, **lavapipe(BUILD)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr.decode()[-500:])
    return json.loads(done.stdout)


def test_demo_holds_its_conversations():
    if not os.path.exists(MODEL):
        raise Skip(f"{MODEL} is not there (make model)")
    here, there = demo("cpu"), demo("vulkan")
    assert there["backend"].startswith("vulkan"), there["backend"]
    assert there["rates"]["same_answers"] == there["rates"]["streams"], there["rates"]
    assert len(here["chats"]) == 8
    for cpu, vulkan in zip(here["chats"], there["chats"]):
        assert vulkan["answers"] == cpu["answers"], (cpu["name"], cpu["answers"], vulkan["answers"])


if __name__ == "__main__":
    sys.exit(run_functions(globals()))
