"""What tools/kernels.py and tools/shaders.py share: sources, their hash, and the generated header that holds them."""

import hashlib
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def fail(text):
    sys.exit("%s: %s" % (os.path.basename(sys.argv[0]), text))


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def write_if_other(path, text):
    if not os.path.exists(path) or read(path) != text:
        with open(path, "w", encoding="utf-8", newline="\n") as f:
            f.write(text)


def run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        fail("%s\n%s" % (" ".join(command), done.stdout))
    return done.stdout


def hash_of(paths, more=""):
    """SHA-256 of files, whatever their line ends, and of a text."""
    h = hashlib.sha256(more.encode())
    for path in paths:
        with open(path, "rb") as f:
            data = f.read().replace(b"\r\n", b"\n")
        h.update(b"%s %d\n" % (os.path.basename(path).encode(), len(data)) + data)
    return h.hexdigest()


def constant(text, name):
    """A constant of a generated header."""
    found = re.search(name + r'(?:\[\])? = "?(\w+?)u?"?;', text)
    if not found:
        raise ValueError("no %s in the header" % name)
    return found.group(1)


def check_header(header, goal, hash_name, source_hash, text_files):
    """The header's text, if it was made from these sources; `goal` of make writes it."""
    if not os.path.exists(header):
        fail("%s is not there: make %s writes it" % (header, goal))
    text = read(header)
    if hash_name not in text or constant(text, hash_name) != source_hash:
        fail("%s was made from other sources than those in %s/: run `make %s` and commit it" %
             (header, os.path.dirname(header), goal))
    if any(read(t) not in text for t in text_files):
        fail("%s does not hold the text of %s: run `make %s`" % (header, ", ".join(text_files), goal))
    return text
