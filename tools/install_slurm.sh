#!/usr/bin/env bash
# Install Debian's Slurm and shellcheck for tests/slurm where that is possible; say so where not.
# Never fails: the tests skip with the reason.
set -uo pipefail
PATH=$PATH:/usr/sbin:/sbin
packages=(slurm-wlm shellcheck)

is_complete() {
  local program
  for program in slurmctld slurmd sbatch shellcheck; do
    command -v "$program" > /dev/null || return 1
  done
}

is_complete && exit 0
if [[ $(id -u) != 0 ]] || ! command -v apt-get > /dev/null; then
  echo "note: no Slurm here; as root on Debian: apt-get install ${packages[*]}"
  exit 0
fi
echo "installing ${packages[*]}"
export DEBIAN_FRONTEND=noninteractive
install=(apt-get install --yes --quiet=2 --no-install-recommends "${packages[@]}")
"${install[@]}" > /dev/null 2>&1 || { apt-get update --quiet=2 && "${install[@]}" > /dev/null; }
is_complete || echo "note: the packages could not be installed"
exit 0
