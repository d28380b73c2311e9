#!/usr/bin/env bash
# Makes .venv if needed and runs the checks: formatter, linter, tests. Arguments go to pytest:
#   bash scripts/test.sh            everything but the slow tests
#   bash scripts/test.sh -m slow    the training runs
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements-dev.txt
ruff format --check --quiet . || fail "files need 'ruff format .'"
ruff check --quiet . || fail "'ruff check .' complains"
exec python -m pytest "$@"
