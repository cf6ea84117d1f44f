#!/bin/bash
# usage: test_compile.sh [HEADER [FOLDER]]
# Compiles kvlite.h the ways its users do, and looks at what comes out: languages and compilers, one and two
# translation units, exported names, mutable globals, macros, calls that a library must not make.
# Prints cmocka's lines, so that tools/run_tests.sh counts the cases. CC, CXX, CLANG, CLANGXX name the compilers.
set -u

here=$(cd "$(dirname "$0")" && pwd)
header=$(realpath "${1:-$here/../../kvlite.h}")
out=${2:-build/compile}
cc=${CC:-gcc} cxx=${CXX:-g++} clang=${CLANG:-clang} clangxx=${CLANGXX:-clang++}

max_lines=12000
warnings='-Wall -Wextra -Wpedantic -Werror'
libs='-lpthread -lm'
failures=0
[[ -r $header ]] || { echo "test_compile.sh: cannot read $header" >&2; exit 1; }
rm -rf "$out"
mkdir -p "$out"

# check NAME FUNCTION ARGS...: one test case; the function's output is shown if it fails, its status 77 skips
check() {
  local name=$1 status=0 text
  shift
  echo "[ RUN      ] $name"
  text=$("$@" 2>&1) || status=$?
  [[ -z $text ]] || printf '%s\n' "$text"
  case $status in
    0) echo "[       OK ] $name" ;;
    77) echo "[  SKIPPED ] $name" ;;
    *) echo "[  FAILED  ] $name"; failures=$((failures + 1)) ;;
  esac
}

skip() { echo "SKIP: $*"; exit 77; }

# compile COMPILER STANDARD ARGS...: COMPILER of a c++ standard takes the C files as C++
compile() {
  local compiler=$1 std=$2 language=c
  shift 2
  if ! command -v "${compiler%% *}" >/dev/null; then
    [[ $compiler != "$cc" && $compiler != "$cxx" ]] || { echo "$compiler is not installed"; return 1; }
    skip "$compiler is not installed"
  fi
  [[ $std == *"++"* ]] && language="c++"
  # shellcheck disable=SC2086
  $compiler -x $language -std="$std" $warnings -I"${header%/*}" -I"$out" "$@"
}

declarations() { compile "$1" "$2" -fsyntax-only "$here/declarations.c"; }

implementation() { # COMPILER STANDARD OBJECT FLAGS...
  local start=$EPOCHREALTIME
  compile "$1" "$2" "${@:4}" -c "$here/implementation.c" -o "$out/$3" || return
  echo "$1 -std=$2 ${*:4}: $(seconds_since "$start") s"
}

seconds_since() { awk -v a="$1" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.3f", b - a }'; }

one_unit() { # COMPILER STANDARD FLAGS...
  local exe=$out/one_unit-$RANDOM
  # shellcheck disable=SC2086
  compile "$1" "$2" "${@:3}" "$here/one_unit.c" -o "$exe" $libs && "$exe"
}

# Every public function as the declarations give it, by gcc's list of prototypes.
list_functions() {
  compile "$cc" c99 -fsyntax-only -aux-info "$out/prototypes" "$here/declarations.c" || return
  grep -F "kvlite.h:" "$out/prototypes" | grep -oE '\bkvl[a-z]*_[a-z0-9_]+ \(' | tr -d ' (' | sort -u >"$out/declared"
  [[ -s $out/declared ]] || { echo "found no function in $header"; return 1; }
  sed 's/.*/FUNCTION(&)/' "$out/declared" >"$out/functions.inc"
  echo "$(wc -l <"$out/declared") public functions"
}

two_units() { # COMPILER STANDARD OBJECT: links OBJECT with a unit that uses every function
  local exe=$out/two_units-$RANDOM
  [[ -e $out/$3 ]] || skip "$3 was not built" # which is a case of its own, above
  compile "$1" "$2" -c "$here/two_units.c" -o "$exe.o" || return
  # shellcheck disable=SC2086
  $cxx "$exe.o" "$out/$3" -o "$exe" $libs && "$exe"
}

# Leaves in $out/nm what nm says of an object built without optimisation (which may hide a variable) and without
# position-independent code (which moves constant tables of pointers to a writable section).
symbols() { # COMPILER STANDARD FLAGS...
  local object=$out/symbols-${*//[^a-z0-9+]/_}.o
  [[ -e $object ]] || compile "$1" "$2" -O0 -fno-pic -fno-pie -Wno-error "${@:3}" -c "$here/implementation.c" -o "$object" || return
  nm "$object" >"$out/nm"
}

# fail_if_any TEXT: fails if lines come in, and shows them
fail_if_any() {
  local lines
  lines=$(cat)
  [[ -z $lines ]] || { echo "$1:"; printf '%s\n' "$lines"; return 1; }
}

exported_names() {
  symbols "$1" "$2" || return
  awk 'NF == 3 && $2 ~ /^[A-Zuvw]$/ { print $3 }' "$out/nm" | sort -u >"$out/exported"
  grep -v '^kvl_' "$out/exported" | fail_if_any "exported names that do not start with kvl_" || return
  comm -13 "$out/declared" "$out/exported" | fail_if_any "exported and not declared"
}

no_mutable_globals() {
  symbols "$1" "$2" || return
  awk 'NF == 3 && $2 ~ /^[dDbBCsSgG]$/' "$out/nm" | fail_if_any "mutable globals"
}

static_option() {
  symbols "$1" "$2" -DKVL_STATIC || return
  awk 'NF == 3 && $2 ~ /^[A-Zuvw]$/ { print $3 }' "$out/nm" | fail_if_any "exported in spite of KVL_STATIC" || return
  one_unit "$1" "$2" -DKVL_STATIC
}

# A library does not end the process, write to its streams, read its environment or change its signals and locale.
no_forbidden_calls() {
  symbols "$1" "$2" || return
  grep -E ' U (_*(abort|exit|_exit|_Exit|quick_exit|assert_fail|assert)|(secure_)?getenv|setenv|putenv|std(in|out|err)|v?printf|__v?printf_chk|puts|putchar|perror|signal|sigaction|raise|kill|setlocale|s?rand|strtok|system|popen|fork|_Unwind_.*|__cxa_.*|_Zn.*)$' \
    "$out/nm" | fail_if_any "calls that the library must not make"
}

# Macros that the header leaves defined. In strict ISO mode the implementation may ask for POSIX.
macros() { # SOURCE PATTERN
  compile "$cc" c99 -E -dD "$here/$1" >"$out/macros.i" || return
  awk -v header="$header" '
    /^# [0-9]+ "/ { file = $3; gsub(/"/, "", file) }
    file == header && $1 == "#define" { name = $2; sub(/\(.*/, "", name); defined[name] = 1 }
    $1 == "#undef" { delete defined[$2] }
    END { for (name in defined) print name }' "$out/macros.i" | sort >"$out/macros"
  [[ -s $out/macros ]] || { echo "found no macro of $header"; return 1; }
  grep -vE "$2" "$out/macros" | fail_if_any "macros that leak"
}

pragmas() { # what the header switches for the compiler, it switches back; unroll and contract end with their loop or block
  awk '/^#pragma (GCC|clang) .*(push|push_options)$/ || /^#pragma (GCC|clang) (diagnostic )?push/ { depth++; next }
    /^#pragma (GCC|clang) .*pop/ { depth--; next }
    /^#pragma (GCC unroll|clang fp contract)/ { next }
    /^#pragma (GCC|clang)/ && depth < 1 { print "outside push and pop: " $0 }
    END { if (depth) print "push without pop: " depth }' <(sed 's/^ *//;/^#pragma/!d' "$header") |
    fail_if_any "pragmas that leak"
}

length() {
  local n
  n=$(wc -l <"$header")
  echo "$n lines"
  ((n <= max_lines)) || { echo "more than $max_lines"; return 1; }
}

# The least of five runs, and what an empty file costs. Reported, never asserted: machines differ.
parse_time() {
  local file start
  : >"$out/empty.c"
  for file in "$out/empty.c" "$here/declarations.c"; do
    for _ in 1 2 3 4 5; do
      start=$EPOCHREALTIME
      compile "$cc" c99 -Wno-pedantic -fsyntax-only "$file" || return
      seconds_since "$start"
      echo
    done | sort -g | head -n 1
  done | paste -sd ' ' | awk '{ printf "declarations: %.0f ms (with %.0f ms for the compiler to start)\n", ($2 - $1) * 1e3, $2 * 1e3 }'
}

bits32() {
  # headers of the machine itself (asm/) are searched last, where no 32-bit set of them is installed
  local flags=(-m32 -idirafter "/usr/include/$("$cc" -print-multiarch)")
  printf '#include <stdlib.h>\n#include <errno.h>\nint main(void) { return 0; }\n' >"$out/m32.c"
  "$1" "${flags[@]}" "$out/m32.c" -o "$out/m32" >/dev/null 2>&1 || skip "$1 -m32 does not link here (no 32-bit libc)"
  "$out/m32" 2>/dev/null || skip "this machine does not run 32-bit programs"
  one_unit "$1" "$2" -O1 "${flags[@]}"
}

# kvlite's own declarations of Vulkan have the layout of Vulkan's headers, where those are installed.
vk_api() {
  echo '#include <vulkan/vulkan_core.h>' | "$1" -x c -fsyntax-only - 2>/dev/null || skip "no Vulkan headers (libvulkan-dev)"
  compile "$1" c11 -fsyntax-only "$here/vk_api.c"
}

for c in "$cc" "$clang"; do
  for std in c99 c11 gnu17; do check "declarations, $c $std" declarations "$c" "$std"; done
done
for c in "$cxx" "$clangxx"; do
  for std in "c++11" "c++17" "c++20"; do check "declarations, $c $std" declarations "$c" "$std"; done
done
check "implementation, $cc c99" implementation "$cc" c99 cc.o -O2
check "implementation, $clang c99" implementation "$clang" c99 clang.o -O2
check "implementation, $cxx c++11" implementation "$cxx" c++11 cxx.o -O2
check "implementation, $clangxx c++11" implementation "$clangxx" c++11 clangxx.o -O2
check "implementation, no CUDA" compile "$cc" c99 -DKVL_NO_CUDA -fsyntax-only "$here/implementation.c"
check "implementation, no Vulkan" compile "$cxx" c++11 -DKVL_NO_VULKAN -fsyntax-only "$here/implementation.c"
check "implementation, neither" compile "$cc" c99 -DKVL_NO_CUDA -DKVL_NO_VULKAN -fsyntax-only "$here/implementation.c"
check "declarations of Vulkan" vk_api "$cc"
check "public functions" list_functions
for c in "$cc" "$clang"; do check "one unit, $c gnu99" one_unit "$c" gnu99; done
for c in "$cxx" "$clangxx"; do check "one unit, $c c++11" one_unit "$c" c++11; done
check "one unit, $cxx c++20" one_unit "$cxx" c++20
check "two units, C and C" two_units "$cc" c99 cc.o
check "two units, C++ and C++" two_units "$cxx" c++11 cxx.o
check "two units, C implements and C++ uses" two_units "$cxx" c++11 cc.o
check "two units, C++ implements and C uses" two_units "$clang" c99 clangxx.o
check "KVL_STATIC, C" static_option "$cc" gnu99
check "KVL_STATIC, C++" static_option "$cxx" c++11
check "exported names, C" exported_names "$cc" c99
check "exported names, C++" exported_names "$cxx" c++11
check "no mutable globals, $cc" no_mutable_globals "$cc" c99
check "no mutable globals, $clangxx" no_mutable_globals "$clangxx" c++11
check "no forbidden calls, $cc" no_forbidden_calls "$cc" c99
check "no forbidden calls, $cxx" no_forbidden_calls "$cxx" c++11
check "macros of the declarations" macros declarations.c '^KVL(ITE)?_'
check "macros of the implementation" macros implementation.c '^KVL(ITE|I)?_|^_POSIX_C_SOURCE$'
check "pragmas" pragmas
check "length" length
check "time to parse the declarations" parse_time
check "32 bits, $cc" bits32 "$cc" gnu99
check "32 bits, $clang" bits32 "$clang" gnu99

echo "[==========] compile run."
((failures == 0))
