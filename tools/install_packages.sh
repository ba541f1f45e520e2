#!/usr/bin/env bash
# Install Debian packages that some tests use, where that is possible; say so where it is not:
#   tools/install_packages.sh slurm-wlm shellcheck chromium
# Never fails: without them their tests skip, with the reason.
set -uo pipefail
PATH=$PATH:/usr/sbin:/sbin

missing=()
for package in "$@"; do
  program=$package
  [[ $package == slurm-wlm ]] && program=slurmctld
  command -v "$program" > /dev/null || missing+=("$package")
done
[[ ${#missing[@]} == 0 ]] && exit 0
if [[ $(id -u) != 0 ]] || ! command -v apt-get > /dev/null; then
  echo "note: not installed: ${missing[*]}; as root on Debian: apt-get install ${missing[*]}"
  exit 0
fi
echo "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
install=(timeout 240 apt-get install --yes --quiet=2 --no-install-recommends "${missing[@]}")
"${install[@]}" > /dev/null 2>&1 ||
  { timeout 120 apt-get update --quiet=2 && "${install[@]}" > /dev/null; } ||
  echo "note: ${missing[*]} could not be installed"
exit 0
