#!/bin/sh
# Installs what `make` and `make test` need, on Debian 12 and its relatives. Quick when all of it is there.
set -eu

# compilers and build; then lint and format; then tests and tools (cmocka, cJSON, the Python oracle); then a Vulkan driver for
# the CPU (lavapipe), the loader with its headers, the validation layer, and what compiles shaders
required='gcc g++ clang make libc6-dev
clang-format clang-tidy cppcheck
libcmocka-dev libcjson-dev python3 python3-venv ca-certificates
mesa-vulkan-drivers libvulkan1 libvulkan-dev vulkan-validationlayers glslang-tools spirv-tools'

# 32-bit compile check on amd64. (gcc-multilib would conflict with the cross compilers.)
optional=''
[ "$(uname -m)" = x86_64 ] && optional='libc6-dev-i386 lib32gcc-12-dev'

if ! command -v apt-get >/dev/null 2>&1 || ! command -v dpkg-query >/dev/null 2>&1; then
  cat >&2 <<'EOF'
make deps: this system has no apt-get, so nothing was installed. kvlite's build and tests need:
  gcc and g++ (or set CC and CXX), GNU make
  for `make model` and the end-to-end tests: Python >= 3.10 with venv and pip
  for the tests: cmocka (headers and library), clang
  for the tests of the Vulkan backend: Vulkan's loader and headers, Mesa's lavapipe, Khronos' validation layer
    (where the last two or the loader's library are missing, these tests are skipped)
  for `make kernels`: glslangValidator and SPIR-V Tools
  for the tools: cJSON (headers and library)
  for `make lint` and `make format`: clang-tidy, cppcheck, clang-format
Install them with your package manager; then `make demo` and `make test` work without `make deps`.
EOF
  exit 1
fi

not_installed() {
  for p in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || echo "$p"
  done
}

# shellcheck disable=SC2086  # the lists are meant to split
{
  missing=$(not_installed $required)
  extra=$(not_installed $optional)
}
if [ -z "$missing$extra" ]; then
  echo "deps: all packages are there"
  exit 0
fi

sudo=''
if [ "$(id -u)" != 0 ]; then
  if ! command -v sudo >/dev/null 2>&1; then
    [ -n "$missing" ] || exit 0
    echo "make deps: neither root nor sudo. As root, run:" >&2
    echo "  apt-get install --no-install-recommends" $missing $extra >&2
    exit 1
  fi
  sudo='sudo'
fi

if [ -n "$missing" ]; then
  echo "deps: installing" $missing
  [ -z "$sudo" ] || echo "deps: sudo may ask for your password"
  $sudo apt-get update -q
fi
for p in $extra; do
  if apt-cache show "$p" >/dev/null 2>&1; then
    missing="$missing $p"
  else
    echo "deps: no package $p here; the 32-bit compile check will be skipped"
  fi
done
# shellcheck disable=SC2086
if [ -n "$missing" ]; then
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing
fi
