#!/bin/bash
# Checks and measures the CUDA backend on this machine's GPU, and the Vulkan backend, within 8 minutes.
#
# usage: tools/gpu_check.sh [options]
#   --mock             no GPU: the kernels run on the CPU through the mock driver, Vulkan's shaders on Mesa's lavapipe; tiny cases
#   --quick            only the cases that have targets
#   --flashinfer PATH  FlashInfer's checkout (or its include folder): measured on the same shapes; needs nvcc
#   --python PYTHON    the interpreter that has PyTorch (default python3)
#   --only LIST        of: build kernels conformance sanitizer same vulkan bench flashinfer torch
#   --out FILE         results (default build/results/gpu_check.json); logs beside it in gpu_check-logs
#
# Needs an NVIDIA driver, gcc and make. Vulkan (libvulkan.so.1 and the driver's ICD file), nvcc, compute-sanitizer, cmocka, PyTorch, FlashInfer: used where they are; what is
# not there is a SKIP line that names it. Prints a line for each part; status 0: nothing failed. `make report` makes
# BENCHMARKS.md's GPU part of the results once they lie in tools/report/results/gpu_check.json.
set -u
cd "$(dirname "$0")/.." || exit 2

mock='' quick='' flashinfer='' only='' python=python3 out=build/results/gpu_check.json
while (($#)); do
  case $1 in
    --mock) mock=1 ;;
    --quick) quick=--quick ;;
    --flashinfer | --python | --only | --out)
      (($# > 1)) || { echo "gpu_check.sh: $1 needs a value" >&2; exit 2; }
      case $1 in --flashinfer) flashinfer=$2 ;; --python) python=$2 ;; --only) only=$2 ;; --out) out=$2 ;; esac
      shift ;;
    -h | --help) sed -n '2,/^set -u/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "gpu_check.sh: option '$1' is unknown (--help)" >&2; exit 2 ;;
  esac
  shift
done

unset MAKEFLAGS MAKELEVEL MFLAGS # a make that runs this has its own
begin=$SECONDS
logs=$(dirname "$out")/gpu_check-logs
rm -rf "$logs"
mkdir -p "$logs" build/gpu || exit 2
rows=$logs/rows
: >"$rows"
parts=() failures=0 background=()
stop_background() { for p in ${background[@]+"${background[@]}"}; do kill "$p" 2>/dev/null; done; }
trap stop_background EXIT

quote() { # a JSON string
  local s=${1//\\/ }
  s=${s//\"/\'}
  printf '"%s"' "$(tr -c '[:print:]' ' ' <<<"$s" | sed 's/ *$//')"
}

# Prints and keeps a part's result: say STATUS NAME SECONDS NOTE
say() {
  printf '%-4s  %-12s %4d s  %s\n' "$1" "$2" "$3" "$4"
  parts+=("{\"part\": $(quote "$2"), \"status\": \"$1\", \"seconds\": $3, \"note\": $(quote "$4")}")
  [ "$1" != FAIL ] || failures=$((failures + 1))
}

wanted() { [ -z "$only" ] || [[ " ${only//,/ } " == *" $1 "* ]]; }

# part NAME LIMIT COMMAND...: PASS where it ends well, SKIP where its status is 77 or it says that it skipped all, else FAIL.
part() {
  local name=$1 limit=$2 start=$SECONDS status=0 note
  shift 2
  wanted "${name%%:*}" || return 0
  timeout -k 5 "$limit" "$@" >"$logs/${name//:/-}.log" 2>&1 || status=$?
  log=$logs/${name//:/-}.log
  note=$(grep -E '^(SKIP|NOT THE SAME)' "$log" | head -1)
  case $status in
    0) if [ -n "$note" ]; then say SKIP "$name" $((SECONDS - start)) "in part: $note"; else say PASS "$name" $((SECONDS - start)) "$(tail -1 "$log")"; fi ;;
    77) say SKIP "$name" $((SECONDS - start)) "${note:-$(tail -1 "$log")}" ;;
    124 | 137) say FAIL "$name" $((SECONDS - start)) "stopped after $limit s; $log" ;;
    *) say FAIL "$name" $((SECONDS - start)) "status $status; $log: ${note:-$(tail -1 "$log")}" ;;
  esac
  return "$status"
}

has() { command -v "$1" >/dev/null 2>&1; }
find_tool() { # of the CUDA toolkit, which is often not on the path
  command -v "$1" 2>/dev/null && return
  local f
  for f in /usr/local/cuda/bin/"$1" /usr/local/cuda/compute-sanitizer/"$1"; do
    [ -x "$f" ] && echo "$f" && return
  done
  return 1
}
nvcc=$(find_tool nvcc) || nvcc=''
sanitizer=$(find_tool compute-sanitizer) || sanitizer=''

# ---- build ----

TEST=build/tests/gpu/test_device
BENCH=build/bench_cuda
VULKAN_TEST=build/tests/gpu/test_vulkan_device
VULKAN_BENCH=build/bench_vulkan
build() {
  local flags=''
  echo '#include <cmocka.h>' | gcc -include stdarg.h -include stddef.h -include setjmp.h -include stdint.h -E - >/dev/null 2>&1 ||
    flags=-Itests/gpu/without_cmocka
  [ -z "$mock" ] || make mock-cuda || return
  make $BENCH $TEST $VULKAN_BENCH $VULKAN_TEST TESTS=gpu ${flags:+CPPFLAGS="$flags"} ${flags:+CMOCKA=-lm} || return
  echo "bench_cuda, test_device, bench_vulkan, test_vulkan_device${flags:+ (without cmocka)}"
}

kernels() {
  has python3 || { echo "SKIP: python3 is not there, so whether the committed kernels are those of the sources is not known"; return 77; }
  python3 tools/kernels.py check && python3 tools/shaders.py check && return
  python3 tools/shaders.py check || return
  [ -z "$mock" ] && [ -n "$nvcc" ] || return 1
  echo "the header is not current: nvcc makes it again"
  python3 tools/kernels.py build --nvcc "$nvcc"
}

# ---- on the device ----

if [ -n "$mock" ]; then
  export LD_LIBRARY_PATH=$PWD/build/mock_cuda${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  smoke=--smoke
else
  smoke=''
fi

# Clocks while the benchmarks run: their least and most say whether the device was throttled.
watch_clocks() {
  [ -z "$mock" ] && has nvidia-smi || return
  nvidia-smi --query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw --format=csv,noheader,nounits -l 1 \
    >"$logs/clocks.csv" 2>/dev/null &
  background+=("$!")
}

sanitize() { # TOOL
  "$sanitizer" --tool "$1" --error-exitcode 9 --launch-timeout 60 $TEST few >"$logs/sanitizer-$1.out" 2>&1
  local status=$?
  cat "$logs/sanitizer-$1.out"
  ! grep -qi 'device not supported' "$logs/sanitizer-$1.out" || { echo "SKIP: compute-sanitizer refuses this device"; return 77; }
  return $status
}

same() {
  $BENCH --only same $smoke --json "$logs/same.rows" || return
  cat "$logs/same.rows" >>"$rows"
  ! grep -q '"equal": false' "$logs/same.rows" || return 1
  grep -q '"section": "same"' "$logs/same.rows" || { echo "nothing was compared"; return 1; }
  echo "$(grep -c '"equal": true' "$logs/same.rows") of $(grep -c '"section": "same"' "$logs/same.rows") comparisons are equal bit for bit"
}

bench() {
  $BENCH --only ceiling,host,copies,store,prefill,decode $smoke $quick --seconds "$1" --json "$logs/bench.rows" || return
  grep -v '"section": "device"' "$logs/bench.rows" >>"$rows"
  grep '"section": "device"' "$logs/bench.rows" >"$logs/device.row"
  echo "$(grep -c '"section": "decode"' "$logs/bench.rows") cases of decode, $(grep -c '"section": "prefill"' "$logs/bench.rows") of prefill, $(grep -c left_out "$logs/bench.rows") left out"
}

# ---- Vulkan: NVIDIA's driver serves it too ----

# With --mock on lavapipe; else on the best device, which must be no CPU.
vulkan_device() {
  if [ -n "$mock" ]; then
    local icd
    icd=$(ls /usr/share/vulkan/icd.d/lvp_icd.*json 2>/dev/null | head -1)
    [ -n "$icd" ] || { echo "SKIP: lavapipe, Mesa's Vulkan driver for the CPU, is not there"; return 77; }
    export VK_ICD_FILENAMES=$icd VK_DRIVER_FILES=$icd
  fi
  $VULKAN_BENCH --only none --json "$logs/vulkan-device.row" || return
  [ -n "$mock" ] || ! grep -q '"cpu": true' "$logs/vulkan-device.row" ||
    { echo "SKIP: the only Vulkan driver is one that runs on the CPU: NVIDIA's has no ICD file here (nvidia_icd.json)"; return 77; }
}

vulkan_conformance() { vulkan_device && $VULKAN_TEST ${mock:+few}; }

vulkan_bench() {
  vulkan_device || return
  $VULKAN_BENCH --only ceiling,decode,prefill,store,copies,host,same $smoke --quick --seconds "$1" --json "$logs/vulkan.rows" || return
  sed 's/^{"section": "/&vulkan /' "$logs/vulkan.rows" >>"$rows"
  ! grep -q '"equal": false' "$logs/vulkan.rows" || return 1
  echo "$(grep -c '"section": "decode"' "$logs/vulkan.rows") cases of decode, $(grep -c '"section": "prefill"' "$logs/vulkan.rows") of prefill, $(grep -c left_out "$logs/vulkan.rows") left out"
}

# The shapes that the peers get, the ones with targets: those that --quick has.
peer_shapes() { $BENCH --list --quick --preset "$1"; }

build_flashinfer() {
  local include=$flashinfer define=''
  [ -d "$include/include" ] && include=$include/include
  [ -f "$include/flashinfer/attention/decode.cuh" ] || { echo "$flashinfer has no flashinfer/attention/decode.cuh"; return 1; }
  echo '#include <cuda/cmath>
    cuda::fast_mod_div<unsigned> by(3);' >build/gpu/cccl.cu
  "$nvcc" -std=c++17 -arch=native -c build/gpu/cccl.cu -o build/gpu/cccl.o 2>/dev/null || define=-DBENCH_FAST_MOD_DIV
  "$nvcc" -std=c++17 -O3 -arch=native $define -I"$include" tools/bench/bench_flashinfer.cu -o build/gpu/bench_flashinfer
}

run_flashinfer() {
  peer_shapes "f16 fp8" | build/gpu/bench_flashinfer >"$logs/flashinfer.rows" || return
  cat "$logs/flashinfer.rows" >>"$rows"
  echo "$(wc -l <"$logs/flashinfer.rows") cases"
}

run_torch() {
  peer_shapes f16 | "$python" tools/bench/bench_torch.py >"$logs/torch.rows" || { # 77: torch is not there
    local status=$?
    cat "$logs/torch.rows"
    return $status
  }
  cat "$logs/torch.rows" >>"$rows"
  echo "$(wc -l <"$logs/torch.rows") cases"
}

machine() { # a JSON object of what nvidia-smi says
  local fields=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,ecc.mode.current
  local values=''
  [ -n "$mock" ] || values=$(nvidia-smi --query-gpu=$fields --format=csv,noheader,nounits 2>/dev/null | head -1)
  printf '{"nvidia_smi": %s, "nvcc": %s' "$(quote "$values")" \
    "$(quote "${nvcc:+$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')}")"
  [ ! -s "$logs/clocks.csv" ] || awk -F', *' '$1 + 0 == $1 { if (!n++ || $1 < a) a = $1; if ($1 > b) b = $1; if ($2 > m) m = $2; if ($3 > t) t = $3; if ($4 > p) p = $4 }
    END { if (n) printf ", \"sm_mhz_least\": %d, \"sm_mhz_most\": %d, \"memory_mhz\": %d, \"celsius_most\": %d, \"watts_most\": %d", a, b, m, t, p }' "$logs/clocks.csv"
  printf '}'
}

write_results() {
  local i
  {
    printf '{"checked": "gpu", "mock": %s, "seconds": %d,\n "machine": %s,\n "device": ' "$([ -n "$mock" ] && echo true || echo false)" \
      $((SECONDS - begin)) "$(machine)"
    if [ -s "$logs/device.row" ]; then head -1 "$logs/device.row"; else echo null; fi
    printf ' ,"parts": [\n'
    for ((i = 0; i < ${#parts[@]}; i++)); do printf '  %s%s\n' "${parts[i]}" "$( ((i + 1 < ${#parts[@]})) && echo ,)"; done
    printf ' ],\n "rows": [\n'
    grep '^{.*}$' "$rows" | grep -v '"section": "device"' | sed 's/^/  /; $!s/$/,/'
    printf ' ]}\n'
  } >"$out.new" && mv "$out.new" "$out"
}

# ---- the parts, in order ----

export -f kernels build sanitize same bench vulkan_device vulkan_conformance vulkan_bench peer_shapes build_flashinfer run_flashinfer \
  run_torch has
export mock logs rows nvcc sanitizer python flashinfer smoke quick TEST BENCH VULKAN_TEST VULKAN_BENCH

for tool in gcc make; do
  has $tool || { say FAIL build 0 "$tool is not there"; write_results; exit 1; }
done
part kernels 240 bash -c kernels
if [ -n "$flashinfer" ] && [ -n "$nvcc" ] && wanted flashinfer; then # it compiles beside the tests
  timeout 300 bash -c build_flashinfer >"$logs/flashinfer-build.log" 2>&1 &
  flashinfer_build=$!
  background+=("$flashinfer_build")
fi
part build 180 bash -c build || { write_results; exit 1; }
if [ -n "$mock" ]; then part conformance 90 $TEST few; else part conformance 120 $TEST; fi
for tool in memcheck racecheck synccheck; do
  if [ -n "$mock" ]; then
    wanted sanitizer && say SKIP "sanitizer:$tool" 0 "the mock driver is none of NVIDIA's"
  elif [ -z "$sanitizer" ]; then
    wanted sanitizer && say SKIP "sanitizer:$tool" 0 "compute-sanitizer is not there (it comes with the CUDA toolkit)"
  else
    part "sanitizer:$tool" 45 bash -c "sanitize $tool"
  fi
done
part same 60 bash -c same
part vulkan:conformance $((mock ? 300 : 75)) bash -c vulkan_conformance
part vulkan:bench $((mock ? 300 : 75)) bash -c "vulkan_bench 45"
if [ -n "${flashinfer_build:-}" ]; then wait "$flashinfer_build"; flashinfer_status=$?; fi
watch_clocks
left=$((440 - (SECONDS - begin)))
[ -z "$flashinfer$quick" ] || left=$((left - 60))
((left > 40)) || left=40
part bench $((left + 60)) bash -c "bench $left"
if [ -n "$mock" ]; then
  wanted flashinfer && say SKIP flashinfer 0 "not with the mock driver"
elif [ -z "$flashinfer" ]; then
  wanted flashinfer && say SKIP flashinfer 0 "no --flashinfer PATH was given"
elif [ -z "$nvcc" ]; then
  wanted flashinfer && say SKIP flashinfer 0 "nvcc is not there to compile it"
elif [ "${flashinfer_status:-0}" != 0 ]; then
  wanted flashinfer && say FAIL flashinfer 0 "it did not compile: $logs/flashinfer-build.log"
else
  part flashinfer 60 bash -c run_flashinfer
fi
if [ -n "$mock" ]; then
  wanted torch && say SKIP torch 0 "not with the mock driver"
elif ! has "$python"; then
  wanted torch && say SKIP torch 0 "$python is not there"
else
  part torch 60 bash -c run_torch
fi
write_results
echo "$((SECONDS - begin)) s; results: $out; logs: $logs"
((failures == 0))
