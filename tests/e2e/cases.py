"""Runs test cases with the lines that tools/run_tests.sh counts."""
import time
import traceback
import sys


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
