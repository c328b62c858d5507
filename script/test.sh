#!/usr/bin/env bash
# The tests, in .venv with everything they need. --all adds the slow ones; other arguments go to pytest.
set -euo pipefail
cd -P "$(dirname "$0")/.."
. script/common.sh

ensure_venv test
slow=()
if [ "${1:-}" = "--all" ]; then shift; slow=(-m "slow or not slow"); fi
.venv/bin/ruff check .
.venv/bin/python -m pytest -q ${slow[@]+"${slow[@]}"} "$@"
