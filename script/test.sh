#!/usr/bin/env bash
# The tests, in .venv with everything they need. --all adds the slow ones; other arguments go to pytest.
# Two processes share the files between them (TEST_PROCESSES=1: one).
set -euo pipefail
cd -P "$(dirname "$0")/.."
. script/common.sh

ensure_venv test
slow=()
if [ "${1:-}" = "--all" ]; then shift; slow=(-m "slow or not slow"); fi
.venv/bin/ruff check .
.venv/bin/python -m pytest -q -n "${TEST_PROCESSES:-2}" --dist loadfile ${slow[@]+"${slow[@]}"} "$@"
