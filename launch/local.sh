#!/usr/bin/env bash
# Train on this machine: launch/local.sh --nproc 4 experiment=quickstart [overrides]
# Several machines without Slurm: see docs/launching.md.
set -euo pipefail
cd "$(dirname "$0")/.."
exec .venv/bin/python -m launch.local "$@"
