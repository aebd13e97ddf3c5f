#!/usr/bin/env bash
# Runs on every TPU VM, called by tpu_pod.sh: sets the machine up and keeps one run going.
#
#   tpu_worker.sh setup [BUCKET]      install this package (extra: tpu), mount BUCKET on ~/bucket
#   tpu_worker.sh start NAME FLAGS    start rlsafety.train FLAGS, unless NAME is running already
#   tpu_worker.sh follow NAME         print NAME's log until it ends
#   tpu_worker.sh result NAME         print: none, running, lost, or exit CODE
#   tpu_worker.sh stop NAME           ask NAME to save and end (SIGTERM), wait up to 2 minutes
#   tpu_worker.sh --dry-run COMMAND   print what COMMAND would do, change nothing
#   tpu_worker.sh --help              this text
#
# The run is detached from the ssh session, so a lost connection costs nothing. Its log is
# ~/rlsafety-runs/NAME.log, its process id and exit code lie beside it.
set -euo pipefail
code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$code/launch/lib.sh"

venv=$HOME/rlsafety-venv
mount=$HOME/bucket
runs=$HOME/rlsafety-runs

alive() {
  [[ -f $runs/$1.pid ]] && kill -0 "$(<"$runs/$1.pid")" 2>/dev/null
}

setup() {
  local bucket=${1:-}
  cd "$code"
  make_venv "$venv"
  install "$venv" tpu --editable '.[tpu]'
  if [[ -n $bucket ]] && ! mountpoint -q "$mount"; then
    [[ ${DRY_RUN:-0} == 1 ]] || command -v gcsfuse >/dev/null ||
      die 'gcsfuse is not on this VM image: install it, or use an image that has it'
    run mkdir -p "$mount"
    run gcsfuse --implicit-dirs "$bucket" "$mount"
  fi
}

start() {
  local name=$1
  shift
  if alive "$name"; then
    note "$name is running already"
    return
  fi
  # Its own session: it outlives ssh.
  local command=(setsid nohup "$code/launch/tpu_worker.sh" supervise "$name" "$@")
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    run "${command[@]}"
    return
  fi
  mkdir -p "$runs"
  rm -f "$runs/$name.exit" "$runs/$name.pid"
  "${command[@]}" >>"$runs/$name.log" 2>&1 </dev/null &
  for _ in {1..50}; do
    if [[ -f $runs/$name.pid ]]; then return; fi
    sleep 0.1
  done
  die "$name did not start, see $runs/$name.log on this worker"
}

# Runs the training in the foreground, passes SIGTERM on, writes down the exit code.
supervise() {
  local name=$1 child status signalled=1
  shift
  echo $$ >"$runs/$name.pid"
  trap 'signalled=1; kill -TERM "$child"' TERM
  cd "$code"
  "$venv/bin/python" -m rlsafety.train "$@" &
  child=$!
  while ((signalled)); do
    signalled=0 status=0
    wait "$child" || status=$?
  done
  echo "$status" >"$runs/$name.exit.part"
  mv "$runs/$name.exit.part" "$runs/$name.exit"
}

follow() {
  if alive "$1"; then
    run tail -n 40 --pid="$(<"$runs/$1.pid")" -F "$runs/$1.log" 2>/dev/null
  else
    run tail -n 40 "$runs/$1.log"
  fi
}

result() {
  if [[ -f $runs/$1.exit ]]; then
    printf 'exit %s\n' "$(<"$runs/$1.exit")"
  elif alive "$1"; then
    echo running
  elif [[ -f $runs/$1.pid ]]; then
    echo lost
  else
    echo none
  fi
}

stop() {
  if ! alive "$1"; then return; fi
  run kill -TERM "$(<"$runs/$1.pid")"
  if [[ ${DRY_RUN:-0} == 1 ]]; then return; fi
  for _ in {1..120}; do
    if ! alive "$1"; then return; fi
    sleep 1
  done
  die "$1 did not end within 2 minutes of SIGTERM"
}

if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=1
  shift
fi
case ${1:-} in
  setup | start | supervise | follow | result | stop) "$@" ;;
  --help | -h) print_help "$code/launch/tpu_worker.sh" ;;
  *) die "unknown command '${1:-}'; see --help" ;;
esac
