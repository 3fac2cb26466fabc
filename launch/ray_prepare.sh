#!/usr/bin/env bash
# Prepares text on all cores of a Ray cluster.
#
#   RAY_ADDRESS=http://HEAD:8265 launch/ray_prepare.sh
#
# It assumes that all nodes have Ray and the project's dependencies (`pip install ".[ray,s3]"`); Ray sends them this
# folder. All of them read the text, and the head node writes the tokens: the output is uploaded from its TMPDIR.
set -euo pipefail
cd "$(dirname "$0")/.."

source='s3://corpora/web/*.jsonl.zst'      # EDIT
out=s3://mine/web                          # EDIT

ray job submit --working-dir . -- python -m gpt_jax prepare "$source" --out "$out" --engine ray
