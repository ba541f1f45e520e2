#!/bin/sh
# Print a Python 3.12 interpreter, or say how to get one. Usage: find_python.sh [preferred]
# Shell builtins only, so that it still speaks where PATH is broken.
for candidate in "$1" python3.12 python3 python; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
        command -v "$candidate"
        exit 0
    fi
done
printf '%s\n' >&2 \
    'hysparse_megatron needs Python 3.12 with the venv module, and none was found on PATH.' \
    'Install one of:' \
    "  pyenv install 3.12            (this folder's .python-version then selects it)" \
    '  uv python install 3.12        then: make setup PYTHON="$(uv python find 3.12)"' \
    "  apt-get install python3.12-venv   (Ubuntu 24.04), or your system's package"
exit 1
