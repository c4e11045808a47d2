#!/usr/bin/env bash
# Writes the lock files of the Dockerfile and of launch/tpu/train.sh: versions and hashes of all
# that setup.py asks for, on Linux with Python 3.12.
#
#     pip install uv && launch/locks/make.sh [--upgrade]
#
# cpu.txt is the package with [gcs]; tpu.txt and cuda.txt are what comes on top. Without
# --upgrade the present versions stay, as far as setup.py still allows them.
set -euo pipefail
cd "$(dirname "$0")/../.."

lock() { # extra, arguments...
  uv pip compile setup.py --extra gcs --output-file "launch/locks/$1.txt" --quiet \
    --python-version 3.12 --python-platform x86_64-manylinux_2_31 --generate-hashes \
    --no-annotate --custom-compile-command launch/locks/make.sh \
    --default-index https://pypi.org/simple "${@:2}"
}

lock cpu "$@"
mapfile -t known < <(sed -n 's/^\([^ =]*\)==.*/--no-emit-package=\1/p' launch/locks/cpu.txt)
for extra in tpu cuda; do
  lock "$extra" --extra "$extra" --constraint launch/locks/cpu.txt "${known[@]}" "$@"
done
