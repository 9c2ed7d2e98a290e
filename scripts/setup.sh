#!/usr/bin/env bash
# Installs what the build and the tests need and this machine lacks. Looks for what a tool can do, not for packages, so
# that a compiler or a Python from elsewhere counts. Quiet and quick when nothing is missing.
set -euo pipefail

say() { echo "setup: $*" >&2; }

packages=()
need() { # package, then the test that it (or something like it) is there
  local package=$1
  shift
  "$@" >/dev/null 2>&1 || packages+=("$package")
}

has_libclang() {
  [ -n "${LIBCLANG_PATH:-}" ] && return 0
  ldconfig -p 2>/dev/null | grep -q 'libclang[-.0-9]*\.so' && return 0
  compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null && return 0
  [ "$(uname)" = Darwin ] && xcode-select -p
}

need make command -v make
need g++ command -v g++
need cmake command -v cmake
need clang command -v clang
need libclang-dev has_libclang
need ccache command -v ccache
need pkg-config command -v pkg-config
need python3 command -v python3
need python3-venv python3 -c 'import venv, ensurepip'
need python3-pip python3 -m pip --version

if [ ${#packages[@]} -gt 0 ]; then
  if ! command -v apt-get >/dev/null; then
    say "missing here: ${packages[*]} (Debian's names). This script installs by apt only; please install them" \
      "with this system's package manager and run it again."
    exit 1
  fi
  sudo=()
  if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
      say "missing here: ${packages[*]}. There is no sudo; run as root: apt-get install ${packages[*]}"
      exit 1
    fi
    sudo=(sudo)
  fi
  say "installing ${packages[*]} by apt${sudo:+ (sudo may ask for your password)}"
  log=$(mktemp)
  trap 'rm -f "$log"' EXIT
  apt() { "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -y -q -o Dpkg::Use-Pty=0 "$@" >>"$log" 2>&1; }
  # The lists of a fresh machine are empty or old; a failing mirror shows itself in the install.
  apt update || true
  if ! apt install --no-install-recommends "${packages[@]}"; then
    cat "$log" >&2
    say "apt could not install ${packages[*]}; its messages are above"
    exit 1
  fi
  say "done"
fi

if ! command -v cargo >/dev/null; then
  say "Rust is missing; install it from https://rustup.rs, open a new shell and run this again"
  exit 1
fi
for component in rustfmt clippy; do
  if ! cargo "${component/rust/}" --version >/dev/null 2>&1; then
    if command -v rustup >/dev/null; then
      say "adding $component to the Rust toolchain"
      rustup --quiet component add "$component"
    else
      say "$component is missing; 'make lint' needs it (it comes with the Rust toolchain)"
    fi
  fi
done
