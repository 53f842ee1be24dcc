#!/usr/bin/env bash
# Set up and run the tests. Arguments go to pytest: bash scripts/test.sh -k order
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
python -m pytest "$@"
