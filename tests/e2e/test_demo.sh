#!/bin/bash
# The demo end to end: the object of --json, plain lines where there is no terminal, bad input, and that a terminal
# is given back as it was. Runs from the root of the checkout on what `make test` builds.
set -u
cd "$(dirname "$0")/../.."
demo=${BUILD:-build}/demo
model=build/models/SmolLM2-135M-Instruct.Q4_1.gguf
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
bad=0

[ -e "$model" ] || { echo "SKIP: no $model (make model)"; exit 77; }

check() { # NAME COMMAND...
  local name=$1
  shift
  echo "[ RUN      ] $name"
  "$@"
  case $? in
    0) echo "[       OK ] $name" ;;
    77) echo "[  SKIPPED ] $name" ;;
    *) echo "[  FAILED  ] $name"; bad=1 ;;
  esac
}

refused() { # STATUS PATTERN ARGUMENTS...: nothing on stdout but what --json leaves there, the reason on stderr
  local status=$1 pattern=$2 got
  shift 2
  "$demo" --json "$@" >"$folder/out" 2>"$folder/err" </dev/null
  got=$?
  [ $got = "$status" ] && [ ! -s "$folder/out" ] && grep -Eq "$pattern" "$folder/err" && return 0
  echo "status $got, not $status, or no \"$pattern\" in:"
  cat "$folder/err"
  return 1
}

bad_input() {
  local ok=0
  head -c 30000000 "$model" >"$folder/short.gguf"
  refused 1 'No such file' -m "$folder/none.gguf" && grep -q 'make model' "$folder/err" || ok=1
  refused 1 "tensor '.*past the" -m "$folder/short.gguf" && grep -q 'make model' "$folder/err" || ok=1
  refused 1 '1000000 bytes does not hold .* it takes [0-9]{8}' -m "$model" --kv-bytes 1000000 || ok=1
  refused 2 'perhaps' --kv perhaps || ok=1
  refused 2 'max-gap-ms' --max-gap-ms -1 || ok=1
  refused 2 'nonsense' --nonsense || ok=1
  return $ok
}

object() {
  "$demo" -m "$model" --json --quick >"$folder/out" 2>"$folder/err" </dev/null || { cat "$folder/err"; return 1; }
  "$python" - "$folder/out" "$folder/err" <<'PY'
import json, sys
d = json.load(open(sys.argv[1], encoding="utf-8"))
log = open(sys.argv[2], encoding="utf-8").read()
keys = {
    "live": "seconds conversations turns prompt_tokens reused_tokens generated_tokens steps preemptions "
            "evicted_blocks max_gap_ms gap_ms first_token_ms",
    "memory": "budget_bytes peak_bytes context_tokens reserved_bytes final_bytes",
    "rates": "streams together_tokens_per_s one_at_a_time_tokens_per_s same_answers",
    "gap": "streams prompt_tokens chunked_ms whole_ms",
    "next_token": "tokens cached_ms recomputed_ms",
}
assert set(d) == set(keys) | {"model", "backend", "threads", "kv", "seed", "quick", "seconds", "chats"}, set(d)
for part, names in keys.items():
    assert set(d[part]) == set(names.split()), (part, set(d[part]))
live, memory, chats = d["live"], d["memory"], d["chats"]
assert live["conversations"] == len(chats) == 8 and live["turns"] == 16 == sum(len(c["answers"]) for c in chats)
assert sum(c["prompt_tokens"] for c in chats) == live["prompt_tokens"]
assert sum(c["reused_tokens"] for c in chats) == live["reused_tokens"]
for c in chats[1:]:  # the system prompt by the first turn, the whole first turn by the second
    assert c["reused_tokens"] >= 128 + 192, c
assert d["rates"]["same_answers"] == d["rates"]["streams"] == 8, d["rates"]
assert 0 < memory["peak_bytes"] <= memory["budget_bytes"] == 64 << 20
assert memory["peak_bytes"] < memory["final_bytes"] < memory["reserved_bytes"]
assert memory["reserved_bytes"] == 8 * memory["context_tokens"] * 30 * 3 * 64 * 2 * 2
assert memory["final_bytes"] == sum(c["tokens"] for c in chats) * 30 * 3 * 64 * 2 * 2
assert d["next_token"]["tokens"] == 1000 and d["next_token"]["cached_ms"] < d["next_token"]["recomputed_ms"]
assert d["gap"]["prompt_tokens"] > 512 and d["gap"]["chunked_ms"] > 0 and d["gap"]["whole_ms"] > 0
assert log.count(" asks ") == log.count(" has the answer ") == 16 and "\x1b" not in log, log
PY
}

plain_lines() { # the first of them, into a pipe
  "$demo" -m "$model" --quick 2>&1 </dev/null | head -n 5 >"$folder/out"
  grep -q '^demo: loading ' "$folder/out" && grep -q 'rivers  *asks 1/2: ' "$folder/out" &&
    ! grep -q $'\x1b' "$folder/out" || { cat "$folder/out"; return 1; }
}

terminal() { # Ctrl-C in the live view, on a terminal of 80 x 24
  "$python" - "$demo" "$model" <<'PY'
import fcntl, os, pty, select, struct, sys, termios, time
try:
    main, side = pty.openpty()
except OSError as why: # a bare chroot has no /dev/pts
    print("SKIP: no pseudo-terminal to be had here:", why)
    sys.exit(77)
fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
before = termios.tcgetattr(side)
pid = os.fork()
if pid == 0:
    os.setsid()
    fcntl.ioctl(side, termios.TIOCSCTTY, 0)
    for fd in 0, 1, 2:
        os.dup2(side, fd)
    os.environ["TERM"] = "xterm"
    os.execv(sys.argv[1], [sys.argv[1], "-m", sys.argv[2], "--quick"])
seen, stop = b"", time.time() + 60
def read():
    ready, _, _ = select.select([main], [], [], 0.1)
    return os.read(main, 65536) if ready else b""
while b"1/2 writes" not in seen.replace(b"\x1b[32m", b"") and time.time() < stop:
    seen += read()
assert b"\x1b[?1049h" in seen and b"KV memory" in seen, seen
during = termios.tcgetattr(side)
assert not during[3] & termios.ECHO
os.write(main, b"\x03")
while os.waitpid(pid, os.WNOHANG)[0] == 0 and time.time() < stop:
    seen += read()
seen += read()
assert time.time() < stop, "it did not end"
assert seen.rstrip().endswith(b"\x1b[?1049l") and b"\x1b[?25h" in seen, seen[-200:]
assert termios.tcgetattr(side)[3] == before[3], "the terminal's mode was not restored"
for frame in seen.split(b"\x1b[H")[1:]:
    assert frame.count(b"\n") <= 23, frame
PY
}

check bad_input bad_input
check object object
check plain_lines plain_lines
check terminal terminal
exit $bad
