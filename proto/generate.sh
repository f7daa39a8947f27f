#!/usr/bin/env bash
# Generates hourglass.v1 from codec.proto, beside it. The generator is pinned in pyproject.toml (extra `test`);
# `generate.sh FOLDER` writes below FOLDER instead, which is how a test finds stale files.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python -m grpc_tools.protoc --proto_path="$here" --python_out="${1:-$here}" --pyi_out="${1:-$here}" \
    --grpc_python_out="${1:-$here}" hourglass/v1/codec.proto
