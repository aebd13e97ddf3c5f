# shellcheck shell=bash
# What quickstart.sh, tests/run.sh and tpu_worker.sh share. Source it; it runs nothing by itself.
# DRY_RUN=1 makes `run` print commands instead of executing them.

die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

note() {
  printf '== %s\n' "$*" >&2
}

run() {
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '+'
    printf ' %q' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# Prints the comment block at the top of a script: the help text is written once.
print_help() {
  sed -n '2,/^[^#]/{/^#/{s/^# \{0,1\}//;p;}}' "$1"
}

# Prints the first Python >= 3.11; $PYTHON, where set, is the only candidate.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  die "no Python 3.11 or newer found (looked for: ${PYTHON:-python3, python3.14 ... python3.11}); \
install one or name it: PYTHON=/path/to/python3 $0"
}

# make_venv VENV: creates it, or makes it again when its Python is gone.
make_venv() {
  local venv=$1 python
  if "$venv/bin/python" -c 'import pip' 2>/dev/null; then return; fi
  python=$(find_python)
  note "creating $venv with $python"
  run "$python" -m venv --clear "$venv" ||
    die "could not create $venv; on Debian and Ubuntu: apt install python3-venv"
}

# install VENV NAME PIP_ARGS...: runs `pip install PIP_ARGS` once per state of setup.py, and says
# why when it fails. The stamp is written last, so an interrupted install is done again.
install() {
  local venv=$1 name=$2 stamp log wanted
  shift 2
  stamp=$venv/.installed-$name
  log=$venv/install-$name.log
  wanted="$* $(cksum <setup.py)"
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then return; fi
  note "installing $name (log: $log)"
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    run "$venv/bin/python" -m pip install "$@"
    return
  fi
  # Python compiles what it imports; compiling all of it first takes a minute.
  if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-compile "$@" \
    >"$log" 2>&1; then
    tail -n 12 "$log" >&2
    printf '%s: pip could not install %s (above: the end of %s). Check the network and the free ' \
      "${0##*/}" "$name" "$log" >&2
    printf 'disk space, then run this again: it goes on from here.\n' >&2
    return 1
  fi
  printf '%s' "$wanted" >"$stamp"
}
