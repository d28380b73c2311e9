# Makes .venv with the given pinned requirements; sourced, as by demo.sh and test.sh, enters it.
# usage: bash scripts/environment.sh requirements.txt && source .venv/bin/activate
# (not sourced by hand: where something is missing, it exits)

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}"

fail() {
  echo "error: $*" >&2
  exit 1
}

find_python() {
  for candidate in python3.11 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "Python 3.11 is missing: install it (Debian: apt-get install python3.11 python3.11-venv)"
}

install() {
  local requirements="$1" wanted
  wanted="$(cat requirements.txt "$requirements" setup.py | cksum)"
  if [ "$(cat .venv/installed-"$requirements" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  for other in .venv/installed-*; do  # plain TensorFlow and tensorflow-tpu overwrite each other
    if [ -e "$other" ] && [[ "$requirements$other" == *-tpu.txt* ]] && [ "$other" != ".venv/installed-$requirements" ]; then
      fail "$other: .venv is for another machine; remove .venv, or use another checkout"
    fi
  done
  echo "Installing $requirements into .venv: a few minutes, about 3 GB ..."
  local python
  python="$(find_python)" || exit 1
  [ -x .venv/bin/python ] || "$python" -m venv .venv \
    || fail "cannot make .venv: install the venv module (Debian: apt-get install python3.11-venv)"
  .venv/bin/python -m pip --version >/dev/null 2>&1 || fail "pip is missing in .venv: remove .venv and start again"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements" \
    || fail "pip could not install $requirements: is the package registry reachable (pip config list)?"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . \
    || fail "pip could not install spinenet_tf itself"
  echo "$wanted" >.venv/installed-"$requirements"
}

install "$1"
source .venv/bin/activate
