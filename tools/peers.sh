#!/bin/sh
# usage: peers.sh FOLDER
# Compiles llama.cpp for this machine, from the source package of llama-cpp-python on PyPI, into a Python environment in
# FOLDER, and links its headers and libraries to FOLDER/include and FOLDER/lib. llama.cpp's own defaults stand:
# -march=native, OpenMP, weights repacked at load. PYTHON names the interpreter.
set -eu

folder=$1
list=$(dirname "$0")/peers.txt
log=$folder/pip.log

fail() {
  echo "make peers: $1" >&2
  exit 1
}

if [ -f "$folder/.made" ] && cmp -s "$list" "$folder/.made" && [ -e "$folder/lib/libllama.so" ]; then
  echo "peers: $(grep '^llama' "$list") is in $folder"
  exit 0
fi
command -v g++ >/dev/null 2>&1 || fail "g++ is missing (make deps)"
rm -rf "$folder"
mkdir -p "$folder"
${PYTHON:-python3} -m venv "$folder/venv" ||
  fail "could not make a Python environment: is python3-venv there? (make deps)"
echo "peers: fetching 80 MB and compiling llama.cpp, 5 to 20 minutes; $log has the details"
# cmake and ninja come with pip's build isolation; -v has the compiler's lines in the log.
if ! CMAKE_ARGS="-DLLAVA_BUILD=OFF" "$folder/venv/bin/python" -m pip install -v --disable-pip-version-check \
  --no-binary llama-cpp-python -r "$list" >"$log" 2>&1; then
  tail -n 15 "$log" >&2
  if grep -qE 'NewConnectionError|name resolution|Max retries|No matching distribution|ProxyError' "$log"; then
    fail "PyPI could not be reached (offline?); llama.cpp's source comes from there. The last lines of $log are above"
  fi
  fail "llama.cpp could not be compiled; the last lines of $log are above"
fi

site=$(cd "$folder" && ls -d venv/lib/python3*/site-packages) # relative: the checkout may be moved
ln -sfn "$site/include" "$folder/include"
ln -sfn "$site/llama_cpp/lib" "$folder/lib"
[ -f "$folder/include/llama.h" ] && [ -f "$folder/include/ggml-cpu.h" ] ||
  fail "the package has no llama.h and ggml-cpu.h in $site/include"
[ -e "$folder/lib/libllama.so" ] && [ -e "$folder/lib/libggml-cpu.so" ] ||
  fail "the package has no libllama.so and libggml-cpu.so in $site/llama_cpp/lib"
cp "$list" "$folder/.made"
echo "peers: $(grep '^llama' "$list") is in $folder"
