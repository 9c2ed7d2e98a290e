#!/usr/bin/env bash
# Makes a virtual environment with the official OpenAI client, which the tests let talk to our API.
# Usage: python-env.sh DIR
set -euo pipefail

venv=$1
client=openai==3.54.0

marker=$venv/.has-$client
if [ -f "$marker" ]; then
  exit 0
fi
echo "venv: installing the $client Python client for the tests" >&2
rm -rf "$venv"
python3 -m venv "$venv"
"$venv/bin/python" -m pip --disable-pip-version-check --quiet install "$client"
touch "$marker"
