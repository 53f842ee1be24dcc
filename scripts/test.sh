#!/usr/bin/env bash
# Set up and run the tests, two files at a time, each on one core. Arguments go to pytest: bash scripts/test.sh -k order
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m pytest -n 2 --dist loadfile "$@"
