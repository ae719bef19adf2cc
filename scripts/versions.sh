#!/usr/bin/env bash
# Runs the tests on sets of versions, each in a virtual environment of its own, and prints a line
# for each set:
#
#   newest     the newest releases, on python3
#   python     the newest releases for the oldest Python that pyproject.toml allows
#   python313  the newest releases on Python 3.13
#   oldest     on that Python, the oldest torch, fastai, pytorch-lightning and transformers
#
#     scripts/versions.sh                  # all sets; removes the environments
#     scripts/versions.sh oldest           # one of them
#     scripts/versions.sh -k ~/venvs       # keeps the environments and logs there, for the next time
#
# PYTHON_NEWEST, PYTHON_OLDEST and PYTHON_313 name other interpreters. An environment takes 3 to 7 GB.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

usage() { sed -n '2,/^set/ s/^# \{0,1\}//p' "$0"; }

keep=
while getopts k:h option; do
    case $option in
        k) keep=$OPTARG ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || set -- newest python python313 oldest
for set in "$@"; do
    case $set in newest | python | python313 | oldest) ;; *) usage >&2; exit 2 ;; esac
done

if [ -n "$keep" ]; then
    mkdir -p "$keep"
    where=$(cd "$keep" && pwd)
else
    where=$(mktemp -d)
    trap 'rm -rf "$where"' EXIT
fi

# What pyproject.toml allows: `name>=version` becomes `name==version`.
lowest() { grep -oE "\"$1>=[0-9.]+" "$root/pyproject.toml" | head -n 1 | tr -d '"' | sed 's/>=/==/'; }
oldest_python=python$(sed -nE 's/^requires-python = ">=([0-9.]+)"/\1/p' "$root/pyproject.toml")
lightning=$(lowest pytorch-lightning)

try() { # set, interpreter, requirements beyond those of pyproject.toml
    local set=$1 python=$2
    shift 2
    local env=$where/$set log=$where/$set.log result status=1
    if ! "$python" -c "" 2>"$log"; then
        result="there is no $python here"
    elif ! { { [ -x "$env/bin/python" ] || "$python" -m venv "$env"; } &&
        "$env/bin/python" -m pip install --quiet -e "$root[dev]" "$@"; } >"$log" 2>&1; then
        result="cannot be installed: $(grep -m 1 ERROR "$log" || tail -n 1 "$log")"
    else
        (cd "$root" && PYTHONDONTWRITEBYTECODE=1 MPLBACKEND=Agg \
            "$env/bin/python" -m pytest -q -p no:cacheprovider) >"$log" 2>&1
        status=$?
        result=$(tail -n 1 "$log")
    fi
    [ $status = 0 ] || { failed=1; grep -E '^(FAILED|ERROR)' "$log" >&2 || tail -n 20 "$log" >&2; }
    summary+=$(printf '%-9s  %-110s  %s' "$set" "$(versions "$env")" "$result")$'\n'
    [ -n "$keep" ] || rm -rf "$env"
}

versions() {
    [ -x "$1/bin/python" ] && "$1/bin/python" - <<'PYTHON'
import platform
from importlib import metadata

names = ["torch", "fastai", "pytorch-lightning", "lightning", "transformers"]
found = {d.name: d.version for d in metadata.distributions() if d.name in names}
versions = [f"{name} {found[name]}" for name in names if name in found]
print(", ".join([f"Python {platform.python_version()}", *versions]))
PYTHON
}

failed=0
summary=
for set in "$@"; do
    case $set in
        newest) try newest "${PYTHON_NEWEST:-python3}" ;;
        python) try python "${PYTHON_OLDEST:-$oldest_python}" ;;
        python313) try python313 "${PYTHON_313:-python3.13}" ;;
        oldest)
            try oldest "${PYTHON_OLDEST:-$oldest_python}" \
                "$(lowest torch)" "$(lowest fastai)" "$lightning" "${lightning#pytorch-}" \
                "$(lowest 'transformers\[torch\]')"
            ;;
    esac
done
printf '\n%s' "$summary"
exit $failed
