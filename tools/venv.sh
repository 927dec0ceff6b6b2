#!/usr/bin/env bash
# Makes the virtual environment $2 with the interpreter $1; installs Debian's venv package where python lacks it.
set -eu
"$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Slipway needs Python 3.11 or later" >&2; exit 1; }
if ! "$1" -c 'import ensurepip' 2>/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -q && apt-get install -qy python3-venv
fi
[ -x "$2/bin/python" ] || "$1" -m venv "$2"
"$2/bin/python" -m pip install --quiet --upgrade pip
