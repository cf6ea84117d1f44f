"""Runs test cases with the lines that tools/run_tests.sh counts."""
import glob
import os
import sys
import time
import traceback


class Skip(Exception):
    """This machine lacks what the case needs."""


def run_case(name, case):
    """False: it failed."""
    print(f"[ RUN      ] {name}", flush=True)
    start = time.monotonic()
    try:
        case()
    except Skip as reason:
        print(f"SKIP: {name}: {reason}\n[  SKIPPED ] {name}", flush=True)
        return True
    except Exception:  # pylint: disable=broad-except
        traceback.print_exc(file=sys.stdout)
        print(f"[  FAILED  ] {name}", flush=True)
        return False
    print(f"[       OK ] {name} ({time.monotonic() - start:.1f} s)", flush=True)
    return True


def run_functions(module, word=""):
    """The test_ functions of a module's globals() with the word in their name; returns an exit status."""
    chosen = [(name, f) for name, f in module.items() if name.startswith("test_") and word in name]
    return 0 if all([run_case(name, f) for name, f in chosen]) else 1


def run_methods(tests, names):
    """The methods named, or all that begin with test_; returns an exit status."""
    chosen = names or [name for name in vars(type(tests)) if name.startswith("test_")]
    return 0 if all([run_case(name, getattr(tests, name)) for name in chosen]) else 1


def lavapipe(build):
    """Variables that make Mesa's lavapipe the only Vulkan driver, with subgroups of 8 and a shader cache of its own (tests/common/vk_env.h)."""
    found = [f for d in ("/usr/share", "/usr/local/share", "/etc") for f in glob.glob(d + "/vulkan/icd.d/lvp_icd.*json")]
    if not found:
        raise Skip("lavapipe, Mesa's Vulkan driver for the CPU, is not there (make deps)")
    cache = os.path.join(build, "vulkan_shaders", "256")
    os.makedirs(cache, exist_ok=True)
    return {"VK_ICD_FILENAMES": found[0], "VK_DRIVER_FILES": found[0], "LP_NATIVE_VECTOR_WIDTH": "256",
            "MESA_SHADER_CACHE_DIR": cache, "VK_LOADER_LAYERS_DISABLE": "~implicit~"}
