# Sourced by the scripts beside it: makes .venv on first use, and again when what it depends on
# has changed. Needs Python 3.11 or newer; PYTHON names another interpreter.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
stamp="$venv/installed"
wanted="$(cat "$root/pyproject.toml" "$root/scripts/constraints.txt" | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    mkdir -p "$venv"
    # Two scripts at once would install over each other; the second finds the work done.
    exec 9>"$venv/lock"
    if command -v flock >/dev/null; then flock 9; fi
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "setting up $venv (once; a minute or two)" >&2
        [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            --constraint "$root/scripts/constraints.txt" --editable "$root[dev]" >&2
        echo "$wanted" >"$stamp"
    fi
    exec 9>&-
fi
