#!/usr/bin/env bash
# Writes requirements.lock and build.lock: what pyproject.toml asks for, as exact versions with their hashes. Versions
# that are there already stay where they can; with --upgrade the newest are taken. It needs uv (pip install uv).
set -euo pipefail
cd "$(dirname "$0")/.."

export UV_CUSTOM_COMPILE_COMMAND="docker/lock.sh"
# For every Python and platform that pyproject.toml allows, from wheels alone: the image compiles nothing.
compile=(uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --only-binary :all: --no-config)

"${compile[@]}" --extra las --extra e57 --extra onnx --extra trace "$@" -o docker/requirements.lock pyproject.toml
python3 -c '
import tomllib

with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["build-system"]["requires"], sep="\n")
' | "${compile[@]}" "$@" -o docker/build.lock -
