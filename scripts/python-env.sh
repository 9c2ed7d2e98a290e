#!/usr/bin/env bash
# Makes a virtual environment with the official OpenAI client, which the tests let talk to our API, or with the packages
# that are named (the benchmark's plot wants matplotlib).
# Usage: python-env.sh DIR [PACKAGE==VERSION…]
set -euo pipefail

venv=$1
shift
packages=("${@:-openai==3.54.0}")

marker=$venv/.has-$(IFS=,; echo "${packages[*]}")
if [ -f "$marker" ]; then
  exit 0
fi
echo "venv: installing ${packages[*]} into $venv" >&2
rm -rf "$venv"
python3 -m venv "$venv"
"$venv/bin/python" -m pip --disable-pip-version-check --quiet install "${packages[@]}"
touch "$marker"
