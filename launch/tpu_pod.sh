#!/usr/bin/env bash
# Trains on a Cloud TPU slice: creates or reuses it, installs, runs on all workers, streams
# worker 0's log, and goes on after every preemption until the run is complete.
#
#   launch/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [options] [-- flags of rlsafety.train]
#
# Commands
#   train    all of it; start it again at any time: it joins what is there
#   status   state of the queued resource and of the run
#   logs     follow worker 0's log
#   stop     save and end the run on all workers, keep the slice
#   delete   delete the queued resource and its VMs
#
# Options
#   --name=NAME            the queued resource, its node, and the run
#   --zone=ZONE            such as us-west4-a
#   --device=v5e-16        slice, named as in rlsafety.tools.plan: v4-*, v5e-*, v5p-*, v6e-*
#   --bucket=BUCKET        Cloud Storage bucket, mounted on every worker as ~/bucket; the run
#                          directory lies there, so that all workers share it and it outlives the
#                          slice. Give it a hierarchical namespace (atomic folder renames).
#   --project=ID           default: that of gcloud
#   --spot                 cheaper and preemptible
#   --reserved             use a reservation
#   --version=IMAGE        TPU VM image, default: the one for the device
#   --network=, --subnetwork=, --service-account=, --internal-ips   as gcloud has them
#   --valid-until-duration=6h   give up when no slice was granted by then
#   --max-restarts=20      times to start again: after every preemption, and after up to 5 restarts
#                          also after a failure such as a dead host; never after bad input
#   --poll=30              seconds between looks at the state
#   --delete-when-done     delete the slice after a complete run
#   --dry-run              print the gcloud commands, run none of them
#   --help                 this text
#
# A slice costs money until `delete`. Nothing secret is read, printed or copied: only files under
# version control travel. Gated weights: put them in the bucket and name them with
# --config.model.path=../bucket/PATH (relative paths start at the code, beside ~/bucket).
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$repo/launch/lib.sh"

PREEMPTED=75  # exit code of rlsafety.train after SIGTERM: saved, start me again
BAD_INPUT=2
CRASHES=5  # restarts after which a failure is final

name='' zone='' device='' bucket='' version='' max_restarts=20 poll=30 delete_when_done=0
where=() create=() ssh_flags=() flags=()
command=${1:-}
case $command in
  train | status | logs | stop | delete) shift ;;
  --help | -h) print_help "$repo/launch/tpu_pod.sh"; exit 0 ;;
  *) die "unknown command '$command'; see --help" ;;
esac
while (($#)); do
  case $1 in
    --) shift; flags=("$@"); break ;;
    --help | -h) print_help "$repo/launch/tpu_pod.sh"; exit 0 ;;
    --dry-run) DRY_RUN=1 ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=}; where+=("$1") ;;
    --project=*) where+=("$1") ;;
    --device=*) device=${1#*=} ;;
    --bucket=*) bucket=${1#*=}; bucket=${bucket#gs://} ;;
    --version=*) version=${1#*=} ;;
    --internal-ips) create+=("$1"); ssh_flags+=(--internal-ip) ;;
    --spot | --reserved | --network=* | --subnetwork=* | --service-account=*) create+=("$1") ;;
    --valid-until-duration=*) create+=("$1") ;;
    --max-restarts=*) max_restarts=${1#*=} ;;
    --poll=*) poll=${1#*=} ;;
    --delete-when-done) delete_when_done=1 ;;
    *) die "unknown option '$1'; flags of the training go after --" ;;
  esac
  shift
done
[[ $name =~ ^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$ ]] ||
  die "--name='$name' must be lower-case letters, digits and dashes, at most 42"
[[ -n $zone ]] || die '--zone is missing'

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

gcloud_tpu() {
  local group=$1 verb=$2
  shift 2
  run gcloud compute tpus "$group" "$verb" "$@" "${where[@]}"
}

# on WORKER COMMAND...: runs a command of tpu_worker.sh there.
on() {
  local worker=$1 line
  shift
  printf -v line '%q ' bash rlsafety-code/launch/tpu_worker.sh "$@"
  gcloud_tpu tpu-vm ssh "$name" --worker="$worker" "${ssh_flags[@]}" --command="$line"
}

# State of the queued resource, or NONE. Any other failure of gcloud is shown and ends us.
state() {
  local answer
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    gcloud_tpu queued-resources describe "$name" --format='value(state.state)' >&2
    echo NONE
  elif answer=$(gcloud_tpu queued-resources describe "$name" --format='value(state.state)' 2>&1); then
    tail -n 1 <<<"$answer"
  elif grep -qiE 'NOT_FOUND|not found' <<<"$answer"; then
    echo NONE
  else
    die "gcloud failed: $answer"
  fi
}

create_slice() {
  local type image facts
  [[ -n $device ]] || die '--device is missing, for example --device=v5e-16'
  facts=$(cd "$repo" && "$(find_python)" -c '
import sys
from rlsafety.tools.devices import device
from rlsafety.errors import run_main
def main(name):
  d = device(name)
  print(d.accelerator_type, d.chip.runtime)
run_main(main, sys.argv[1])' "$device") || exit 2
  read -r type image <<<"$facts"
  [[ -n $image ]] || die "--device=$device is no TPU"
  note "asking for $name ($type)"
  gcloud_tpu queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="${version:-$image}" "${create[@]}"
}

delete_slice() {
  note "deleting $name"
  gcloud_tpu queued-resources delete "$name" --force --quiet
}

# Returns when the slice is ACTIVE; makes it, or makes it anew, as often as that takes.
ensure_active() {
  local now last=''
  while :; do
    now=$(state)
    if [[ $now != "$last" ]]; then note "$name: $now"; fi
    last=$now
    case $now in
      ACTIVE) return ;;
      NONE) create_slice ;;
      SUSPENDED | FAILED) delete_slice ;;
      *) ;; # ACCEPTED, CREATING, WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDING, DELETING
    esac
    if [[ ${DRY_RUN:-0} == 1 ]]; then return; fi
    sleep "$poll"
  done
}

# Copies the tracked files (with uncommitted changes, without anything else) and installs.
prepare() {
  local archive try
  archive=$scratch/code.tgz
  git -C "$repo" ls-files -z |
    tar -C "$repo" --ignore-failed-read --null --files-from=- -czf "$archive" || return 1
  # The first ssh to each worker spreads the key and may fail; --worker=all reports all or nothing.
  for try in 1 2 3; do
    if gcloud_tpu tpu-vm ssh "$name" --worker=all "${ssh_flags[@]}" --command=true; then break; fi
    if ((try == 3)); then return 1; fi
    sleep "$poll"
  done
  note 'copying the code, installing on all workers'
  gcloud_tpu tpu-vm scp "$archive" "$name:rlsafety-code.tgz" --worker=all "${ssh_flags[@]}" || return 1
  gcloud_tpu tpu-vm ssh "$name" --worker=all "${ssh_flags[@]}" \
    --command="rm -rf rlsafety-code; mkdir rlsafety-code; tar -xzf rlsafety-code.tgz -C rlsafety-code" ||
    return 1
  on all setup "$bucket"
}

train() {
  local restarts=0 answer
  [[ -n $bucket ]] || die '--bucket is missing: the run directory has to outlive the slice'
  case " ${flags[*]} " in *' --config='*) ;; *) die 'no --config=FILE after --' ;; esac
  case " ${flags[*]} " in *' --workdir='*) ;; *)
    # shellcheck disable=SC2088
    flags+=("--workdir=../bucket/runs/$name") ;;
  esac
  while :; do
    ensure_active
    answer=$(on 0 result "$name" 2>/dev/null | tail -n 1) || answer=none
    if [[ $answer != running && $answer != 'exit 0' ]]; then
      if prepare && on all start "$name" "${flags[@]}"; then
        note "$name is running; its log, live (Ctrl-C leaves it running):"
        answer=running
      else
        answer=unreachable
      fi
    fi
    if [[ $answer != unreachable ]]; then
      on 0 follow "$name" || true
      if [[ ${DRY_RUN:-0} == 1 ]]; then return; fi
      answer=$(on 0 result "$name" | tail -n 1) || answer=unreachable
    fi
    case $answer in
      'exit 0')
        note "$name is complete: gs://$bucket"
        if ((delete_when_done)); then delete_slice; fi
        return
        ;;
      running) note 'the connection dropped, joining again'; sleep "$poll"; continue ;;
      "exit $PREEMPTED" | lost | none | unreachable) ;;
      *)
        if [[ $answer == "exit $BAD_INPUT" ]] || ((restarts >= CRASHES)); then
          die "the run failed ($answer), the slice is kept; read $0 logs, then $0 delete"
        fi
        ;;
    esac
    ((restarts += 1))
    if ((restarts > max_restarts)); then die "gave up after $max_restarts restarts"; fi
    note "interrupted ($answer), restart $restarts of at most $max_restarts"
    on all stop "$name" || true
    sleep "$poll"
  done
}

case $command in
  train) train ;;
  status)
    now=$(state)
    echo "slice: $now"
    if [[ $now == ACTIVE ]]; then echo "run: $(on 0 result "$name" | tail -n 1)"; fi
    ;;
  logs) on 0 follow "$name" ;;
  stop) on all stop "$name" ;;
  delete) delete_slice ;;
esac
