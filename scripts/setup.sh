# Sourced by demo.sh and test.sh: makes .venv from requirements.txt once, and puts it on PATH.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
wanted=$(cksum < requirements.txt)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  for python in python3 python3.13 python3.12 python3.11 none; do  # asked, not just found: a pyenv shim may not run
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
  done
  [ "$python" != none ] || { echo "error: Python 3.11 or newer is needed, and none was found on PATH" >&2; exit 2; }
  echo "setting up .venv with $("$python" --version) (a few minutes, once)"
  "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  echo "$wanted" > .venv/installed  # last: an interrupted installation is done again
fi
export PATH="$PWD/.venv/bin:$PATH"
