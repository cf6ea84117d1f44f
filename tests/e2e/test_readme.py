#!/usr/bin/env python3
"""The README's longer examples compile, as C and as far as they are C++."""
import os
import re
import subprocess
import sys
import tempfile

from cases import Skip, run_functions

CC = os.environ.get("CC", "gcc")


def example(name):
    with open("README.md", encoding="utf-8") as f:
        found = re.search(rf"<!-- {name} example -->\n```c\n(.*?)```\n", f.read(), re.S)
    assert found, f"README.md has no {name} example"
    return found.group(1)


def compile_c(text, *args):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "example.c")
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)
        return subprocess.run([CC, "-std=c99", "-Wall", "-Wextra", "-Werror", "-I.", *args, "-fsyntax-only", path],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False)


def test_vulkan():
    if compile_c("#include <vulkan/vulkan.h>\n").returncode:
        raise Skip("vulkan/vulkan.h is not there (make deps: libvulkan-dev)")
    app = "#include <stdlib.h>\nvoid mutex_lock(void *);\nvoid mutex_unlock(void *);\n"
    done = compile_c(app + example("vulkan"))
    assert done.returncode == 0, done.stdout
    done = compile_c(app + example("vulkan").replace("physical_device", "no_such_member"))
    assert done.returncode != 0 and "no_such_member" in done.stdout, "a wrong member passed"


if __name__ == "__main__":
    sys.exit(run_functions(globals()))
