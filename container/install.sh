#!/usr/bin/env bash
# Install this project with Transformer Engine into /opt/hysparse, from the folder above: what the
# Dockerfile and the Apptainer definition both run, as root, in an image of CUDA with its compiler.
set -euo pipefail
cd "$(dirname "$0")/.."

export DEBIAN_FRONTEND=noninteractive
apt-get update --quiet=2
apt-get install --yes --quiet=2 --no-install-recommends \
  build-essential cmake git ninja-build python3.12 python3.12-dev python3.12-venv
rm -rf /var/lib/apt/lists/*

python3.12 -m venv /opt/hysparse
install=(/opt/hysparse/bin/python -m pip install --no-cache-dir --constraint constraints.txt)
"${install[@]}" ".[data,huggingface,muon,report,tensorboard]" setuptools wheel pybind11

# Its PyTorch part is built against the torch that is there, by nvcc: about 20 minutes on 8 cores.
export NVTE_FRAMEWORK=pytorch MAX_JOBS="${MAX_JOBS:-8}"
"${install[@]}" --no-build-isolation ".[te]"

/opt/hysparse/bin/hysparse --version
/opt/hysparse/bin/python -c 'from importlib import metadata; print(metadata.version("transformer-engine"))'
