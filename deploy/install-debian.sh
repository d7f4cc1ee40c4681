#!/bin/sh
# Makes sure that Java, Maven, git and Python's venv are there, what the tests and the demo need; with
# the word `compiler`, that a C compiler and Python's headers are.
# Installs them as root on Debian or Ubuntu; anywhere else says in one line what to install.
set -eu

needed=""
if [ "${1:-}" = compiler ]; then
    command -v cc >/dev/null || needed="$needed gcc libc6-dev"
    headers=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -e "$headers/Python.h" ] || needed="$needed python3-dev"
else
    command -v java >/dev/null || needed="$needed openjdk-17-jre-headless"
    command -v mvn >/dev/null || needed="$needed maven"
    command -v git >/dev/null || needed="$needed git"
    python3 -c "import ensurepip, venv" 2>/dev/null || needed="$needed python3-venv"
fi
[ -n "$needed" ] || exit 0

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "Missing programs. On Debian: sudo apt-get install$needed" >&2
    exit 1
fi
echo "Installing$needed" >&2
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq >&2
# shellcheck disable=SC2086  # a list of names, split on purpose
apt-get install -y -qq --no-install-recommends $needed >&2
