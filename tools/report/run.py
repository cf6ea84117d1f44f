#!/usr/bin/env python3
"""Runs the measurements that BENCHMARKS.md shows and keeps what each printed in tools/report/results/NAME.json:
{"name", "command", "seconds", "quick", "machine", "result"}, or with "skipped" or "failed" in the place of "result".
page.py and plots.py draw from these files alone.

    run.py [--quick] [--data FOLDER] [--only NAME,...] [--list]
"""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time

import steps as plan

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
RESULTS = os.path.join(HERE, "results")


def read(path, pattern, default=""):
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            found = re.search(pattern, f.read(), re.M)
    except OSError:
        return default
    return found.group(1).strip() if found else default


def machine():
    """What the page says about this machine: nothing that names it, all that explains its speed."""
    flags = read("/proc/cpuinfo", r"^flags\s*:(.*)$").split()
    return {
        "cpu": read("/proc/cpuinfo", r"^model name\s*:(.*)$", platform.machine()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "simd": "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "",
        "l3": read("/sys/devices/system/cpu/cpu0/cache/index3/size", r"(.*)"),
        "memory_gib": round(int(read("/proc/meminfo", r"^MemTotal:\s*(\d+)", "0")) / 2**20),
        "system": read("/etc/os-release", r'^PRETTY_NAME="?([^"\n]*)', platform.system()),
        "compiler": subprocess.run(["gcc", "-dumpfullversion"], capture_output=True, text=True, check=False).stdout.strip(),
    }


def save(name, record):
    path = os.path.join(RESULTS, name + ".json")
    with open(path + ".new", "w", encoding="utf-8") as f:
        json.dump(record, f, indent=1, sort_keys=True)
        f.write("\n")
    os.replace(path + ".new", path)


def result_of(text):
    """One JSON value; or one a line, which are its rows."""
    lines = text.splitlines()
    if len(lines) > 1 and all(line.startswith("{") and line.endswith("}") for line in lines):
        return {"rows": [json.loads(line) for line in lines]}
    return json.loads(text)


def run_step(step, quick, data, base):
    """One step's record. A missing file is a skip; a command that fails or prints no JSON is a failure."""
    for need, how in step.needs(data):
        if not os.path.exists(os.path.join(ROOT, need)):
            return dict(base, skipped=f"{need} is not there: {how}")
    argv = step.command(quick, data)
    base = dict(base, command=shlex.join(step.command(quick, "DATA")))
    try:
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=step.limit, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return dict(base, failed=str(error))
    if done.returncode == 77:
        return dict(base, skipped=(done.stdout + done.stderr).strip()[-300:])
    if done.returncode:
        return dict(base, failed=f"status {done.returncode}: {done.stderr.strip()[-600:]}")
    try:
        return dict(base, result=result_of(done.stdout))
    except ValueError as error:
        return dict(base, failed=f"no JSON: {error}: {done.stdout[:200]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="small versions of all, some minutes")
    parser.add_argument("--data", default="../shared/data", help="folder of traces and texts")
    parser.add_argument("--only", help="names of steps, with commas")
    parser.add_argument("--list", action="store_true", help="list the steps and end")
    args = parser.parse_args()
    chosen = plan.STEPS
    if args.only:
        names = args.only.split(",")
        unknown = set(names) - {s.name for s in plan.STEPS}
        if unknown:
            parser.error(f"no such step: {', '.join(sorted(unknown))} (--list shows them)")
        chosen = [s for s in plan.STEPS if s.name in names]
    if args.list:
        for s in chosen:
            print(f"{s.name:24} {s.what}")
        return 0

    os.makedirs(RESULTS, exist_ok=True)
    this, failures, begin = machine(), 0, time.monotonic()
    for i, step in enumerate(chosen):
        print(f"[{i + 1}/{len(chosen)}] {step.name}: {step.what} …", end=" ", flush=True)
        start = time.monotonic()
        record = run_step(step, args.quick, args.data, {"name": step.name, "quick": args.quick, "machine": this})
        record["seconds"] = round(time.monotonic() - start, 1)
        save(step.name, record)
        word = next((w for w in ("skipped", "failed") if w in record), "done")
        print(f"{word} in {record['seconds']:.0f} s", flush=True)
        if word != "done":
            print(f"{'SKIP' if word == 'skipped' else 'FAILED'} {step.name}: {record[word]}", flush=True)
        failures += word == "failed"
    print(f"{len(chosen)} measurements in {(time.monotonic() - begin) / 60:.1f} minutes, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
