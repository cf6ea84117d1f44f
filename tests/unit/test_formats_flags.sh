#!/bin/bash
# The encoders give the same bytes whatever the compiler may do with floats: the format tests, built so that it may
# fuse products with sums (GCC does by default where the target has FMA).
set -eu
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

try() {
  echo "== $*"
  "$@" -std=gnu11 -w tests/unit/test_formats.c -o "$folder/test" -lcmocka -lpthread -lm
  "$folder/test" >"$folder/log" 2>&1 || { cat "$folder/log"; echo "FAILED: $*"; exit 1; }
}

native=
case $(uname -m) in x86_64 | i?86) native=-march=native ;; esac
try "${CC:-gcc}" -O2 $native -ffp-contract=fast
if command -v "${CLANG:-clang}" >/dev/null; then
  try "${CLANG:-clang}" -O2 $native -ffp-contract=fast
fi
