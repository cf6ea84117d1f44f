#!/bin/bash
# usage: run_tests.sh [-t SECONDS] [-o FOLDER] PROGRAM...
# Runs each test program from the root of the checkout, prints one line for each, the output of those that
# failed, the reasons for what was skipped, and ends with "N passed, N failed, N skipped".
#
# A program may be a binary, a .sh or a .py file. Its status 77 means that it was skipped as a whole. Test cases
# are counted from cmocka's lines ("[ RUN      ] name" and so on); a program without such lines counts as one.
# The reason for a skip is each output line that starts with SKIP.
set -u

limit=300
logs=build/test-logs
while getopts t:o: option; do
  case $option in
    t) limit=$OPTARG ;;
    o) logs=$OPTARG ;;
    *) sed -n '2,3s/^# //p' "$0"; exit 2 ;;
  esac
done
shift $((OPTIND - 1))
trap 'exit 130' INT
cd "$(dirname "$0")/.." || exit 2
mkdir -p "$logs"

passed=0 failed=0 skipped=0
failures=() reasons=()

count() { grep -c "$1" "$log" || true; }

# Sets ok, bad and skip to the number of test cases in $log of a program that ended with status $1.
tally() {
  local run
  run=$(count '^\[ RUN      \] ')
  ok=$(count '^\[       OK \] ')
  # a skipped case is named once when it is skipped and once more in cmocka's closing list
  skip=$(sed -n '/^\[==========\].*run\.$/q; /^\[  SKIPPED \] /p' "$log" | wc -l)
  bad=$((run - ok - skip))
  if ((run == 0)); then
    ok=0 bad=0 skip=0
    case $1 in 0) ok=1 ;; 77) skip=1 ;; *) bad=1 ;; esac
  elif (($1 != 0 && bad <= 0)); then
    bad=1 # it broke outside its test cases
  fi
}

run_one() {
  local program=$1 command=("$1") name status=0 start end word note=''
  name=${program#*tests/}
  log=$logs/${name//\//-}.log
  case $program in
    *.py) command=("${PYTHON:-python3}" "$program") ;;
    */*) ;;
    *) command=("./$program") ;;
  esac
  start=${EPOCHREALTIME/./}
  { timeout -k 5 "$limit" "${command[@]}" </dev/null >"$log" 2>&1; } 2>/dev/null || status=$?
  end=${EPOCHREALTIME/./}
  tally "$status"
  passed=$((passed + ok)) failed=$((failed + bad)) skipped=$((skipped + skip))

  word=ok
  ((skip > 0 && ok == 0)) && word=SKIPPED
  ((bad > 0)) && word=FAIL
  ((skip > 0)) && note=", $skip skipped"
  case $status in
    124 | 137) ((bad > 0)) && note="$note, stopped after $limit s" ;;
    *) ((status > 128)) && note="$note, signal $((status - 128))" ;;
  esac
  printf '%-8s %-36s %7.1f s  %d passed%s\n' "$word" "$name" "$(((end - start) / 100000))e-1" "$ok" \
    "$( ((bad > 0)) && printf ', %d failed' "$bad")$note"
  if ((bad > 0)); then
    failures+=("$name")
    echo "---- $name, status $status: the last 200 lines of $log"
    tail -n 200 "$log"
    echo "----"
  fi
  if ((skip > 0)); then
    local reason line
    reason=$(grep '^SKIP' "$log" | sort -u)
    while IFS= read -r line; do reasons+=("$name: $line"); done <<<"${reason:-SKIP: no reason given}"
  fi
}

(($# > 0)) || { echo "run_tests.sh: no test programs given" >&2; exit 2; }
for p in "$@"; do run_one "$p"; done

echo
((${#reasons[@]} == 0)) || printf 'SKIPPED  %s\n' "${reasons[@]}"
((${#failures[@]} == 0)) || printf 'FAILED   %s\n' "${failures[@]}"
echo "$passed passed, $failed failed, $skipped skipped"
((failed == 0))
