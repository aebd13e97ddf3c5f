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
install one or name it: PYTHON=/path/to/python3 $0; or install uv, which brings its own"
}

# The path of uv, or nothing. uv brings a Python of its own where the machine's is too old, and
# installs quickly; where UV is set it makes the environments and does the installs.
UV=''

# bring_uv DIR: sets UV to the machine's uv, or installs it into DIR with whatever pip there is.
bring_uv() {
  if UV=$(command -v uv); then return; fi
  UV=$1/bin/uv
  if [[ -x $UV ]] || python3 -m pip install --disable-pip-version-check --quiet --target="$1" uv
  then return; fi
  UV=''
}

# quick_installs VENV: has uv do the installs, in a third of pip's time; but pip where pip was told
# of another index, for uv does not read pip's settings. An extra index is asked by pip alone, where
# uv did not find everything.
quick_installs() {
  local pip=("$1/bin/python" -m pip --disable-pip-version-check) settings
  if [[ -n $UV || ${DRY_RUN:-0} == 1 ]]; then return; fi
  settings=$("${pip[@]}" config list)
  if [[ $settings =~ [.](index-url|no-index)= ]]; then return; fi
  if UV=$(command -v uv); then return; fi
  "${pip[@]}" install --quiet --no-compile uv >/dev/null 2>&1 || true
  if [[ -x $1/bin/uv ]]; then UV=$1/bin/uv; fi
}

# make_venv VENV: creates it, or makes it again when its Python is gone.
make_venv() {
  local venv=$1 python
  if "$venv/bin/python" -c 'import pip' 2>/dev/null; then return; fi
  if [[ -z $UV && -z ${PYTHON:-} ]] && ! (find_python >/dev/null 2>&1); then
    UV=$(command -v uv) || UV=''
  fi
  if [[ -n $UV ]]; then
    if "$venv/bin/python" -c '' 2>/dev/null; then return; fi
    note "creating $venv with $UV"
    run "$UV" venv --quiet --clear --python '>=3.11,<3.14' "$venv" ||
      die "uv found no Python 3.11 to 3.13 on this machine and could not fetch one: is there a way \
out to the network?"
    return
  fi
  python=$(find_python)
  note "creating $venv with $python"
  run "$python" -m venv --clear "$venv" ||
    die "could not create $venv; on Debian and Ubuntu: apt install python3-venv"
}

# install VENV NAME ARGUMENTS...: installs ARGUMENTS, as pip takes them, once per state of setup.py,
# and says why when it fails. The stamp is written last, so an interrupted install is done again.
install() {
  local venv=$1 name=$2 stamp log wanted line again=(false)
  shift 2
  stamp=$venv/.installed-$name
  log=$venv/install-$name.log
  wanted="$* $(cksum <setup.py)"
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then return; fi
  note "installing $name (log: $log)"
  # Python compiles what it imports; compiling all of it first takes a minute.
  line=("$venv/bin/python" -m pip install --disable-pip-version-check --no-compile "$@")
  if [[ -n $UV ]]; then
    # An environment that uv made has no pip to try again with.
    if "$venv/bin/python" -c 'import pip' 2>/dev/null; then again=("${line[@]}"); fi
    line=("$UV" pip install --python "$venv/bin/python" "$@")
  fi
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    run "${line[@]}"
    return
  fi
  if ! "${line[@]}" >"$log" 2>&1 && ! "${again[@]}" >>"$log" 2>&1; then
    tail -n 12 "$log" >&2
    printf '%s: could not install %s (above: the end of %s). Check the network and the free ' \
      "${0##*/}" "$name" "$log" >&2
    printf 'disk space, then run this again: it goes on from here.\n' >&2
    return 1
  fi
  printf '%s' "$wanted" >"$stamp"
}
