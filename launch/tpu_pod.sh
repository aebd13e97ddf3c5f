#!/usr/bin/env bash
# Trains on a Cloud TPU slice: creates or reuses it, installs, runs on all workers, streams
# worker 0's log, and goes on after every preemption until the run is complete.
#
#   launch/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [options] [-- flags of rlsafety.train]
#
# Commands
#   train    all of it; start it again at any time: it joins what is there
#   status   state of the queued resource and of the run, and what the slice has cost
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
#   --image=IMAGE          train in this container (launch/k8s/Dockerfile, EXTRA=tpu) in place of an
#                          environment that is installed on the VMs
#   --hf-secret=NAME       gated models: Secret Manager's name of the Hugging Face token, which the
#                          VMs' service account may read
#   --network=, --subnetwork=, --service-account=, --internal-ips   as gcloud has them
#   --valid-until-duration=6h   give up, with exit code 2, when no slice was granted by then
#   --max-restarts=20      times to start again: after every preemption, and after up to 5 restarts
#                          also after a failure such as a dead host; never after bad input or
#                          where the VMs' set-up can never succeed
#   --poll=30              seconds between looks at the state
#   --delete-when-done     delete the slice when the run is complete, and when it never will be
#   --dry-run              print the gcloud commands, run none of them
#   --help                 this text
#
# RLSAFETY_PYTHON names a Python with this package, to check the flags before a slice is made
# (default: .venv/bin/python).
#
# A slice costs money until `delete`. Nothing secret is read, printed or copied here: only files
# under version control travel. Weights in the bucket are named with
# --config.model.path=../bucket/PATH (relative paths start at the code, beside ~/bucket).
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$repo/launch/lib.sh"

PREEMPTED=75  # exit code of rlsafety.train after SIGTERM: saved, start me again
BAD_INPUT=2
CRASHES=5  # restarts after which a failure is final
SETUPS=3  # tries of an installation that fails: the network may have been away

name='' zone='' device='' bucket='' version='' max_restarts=20 poll=30 delete_when_done=0
image='' hf_secret='' where=() create=() ssh_flags=() flags=()
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
    --image=*) image=${1#*=} ;;
    --hf-secret=*) hf_secret=${1#*=} ;;
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

# facts CODE ARGUMENTS...: runs a line of Python that knows our devices; it needs no package.
facts() {
  local python
  python=$(find_python) || exit 2
  (cd "$repo" && "$python" -c "
import datetime, sys
from rlsafety.tools.devices import bill, cost_line, device
from rlsafety.errors import run_main
def main(*arguments):
  $1
run_main(main, *sys.argv[1:])" "${@:2}")
}

# Refuses what the run would refuse, before a slice is paid for, where the package is installed here.
check_flags() {
  local python=${RLSAFETY_PYTHON:-$repo/.venv/bin/python}
  if ! "$python" -c 'import jax' 2>/dev/null; then
    note "the flags are not checked here: $python has no rlsafety (RLSAFETY_PYTHON names another)"
    return
  fi
  (cd "$repo" && "$python" -m rlsafety.tools.fits --device="$device" "${flags[@]}") || exit 2
}

create_slice() {
  local answer type runtime price
  [[ -n $device ]] || die '--device is missing, for example --device=v5e-16'
  if [[ ${DRY_RUN:-0} != 1 ]]; then check_flags; fi
  answer=$(facts 'd = device(*arguments)
  print(d.accelerator_type, d.chip.runtime or "-", bill(d, 1.0))' "$device") || exit 2
  read -r type runtime price <<<"$answer"
  [[ $runtime != - ]] ||
    die "--device=$device is not in the Cloud TPU API; GPUs and TPU7x: launch/k8s/render.py"
  note "asking for $name ($type); an hour of it: $price"
  gcloud_tpu queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="${version:-$runtime}" "${create[@]}"
}

delete_slice() {
  note "deleting $name"
  gcloud_tpu queued-resources delete "$name" --force --quiet
}

# The run can never complete: says why, and keeps the slice or deletes it, as was asked for.
give_up() {
  if ((delete_when_done)); then
    note "$1"
    delete_slice
    die "$name will not complete; the slice is deleted"
  fi
  die "$1; the slice is kept and costs money: read $0 logs, then $0 delete"
}

# Returns when the slice is ACTIVE; makes it, or makes it anew, as often as that takes. A request
# of ours that FAILED was not granted (in time, or at all): asking again would never end.
ensure_active() {
  local now last='' asked=0 why
  while :; do
    now=$(state)
    if [[ $now != "$last" ]]; then note "$name: $now"; fi
    last=$now
    case $now in
      ACTIVE) return ;;
      NONE) create_slice; asked=1 ;;
      FAILED)
        if ((asked)); then
          why=$(gcloud_tpu queued-resources describe "$name" \
            --format='value(state.failedData.error.message)' 2>&1 | tail -n 1)
          delete_slice # the request: there is no VM, and its name is free again
          die "no slice was granted (FAILED: ${why:-no reason given}); nothing runs, nothing costs"
        fi
        delete_slice
        ;;
      SUSPENDED) delete_slice ;;
      *) ;; # ACCEPTED, CREATING, WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDING, DELETING
    esac
    if [[ ${DRY_RUN:-0} == 1 ]]; then return; fi
    sleep "$poll"
  done
}

# Writes into $archive the tracked files (with uncommitted changes, without anything else), and a
# file REVISION in place of their history.
pack() {
  local archive=$1 revision
  revision=$(git -C "$repo" rev-parse HEAD) || return 1
  if [[ -n $(git -C "$repo" status --porcelain -uno) ]]; then revision+=+changes; fi
  printf '%s\n' "$revision" >"$scratch/REVISION"
  git -C "$repo" ls-files -z |
    tar -C "$repo" --ignore-failed-read --null --files-from=- -cf "$scratch/code.tar" || return 1
  tar -C "$scratch" -rf "$scratch/code.tar" REVISION || return 1
  gzip -c "$scratch/code.tar" >"$archive"
}

# Copies the code and installs. 0: ready. 2: this can never succeed. 1: the set-up failed. 255: the
# VMs were not reached. ssh hands on the exit code of what it ran there.
prepare() {
  local archive=$scratch/code.tgz try status=0
  pack "$archive" || return 2
  # The first ssh to each worker spreads the key and may fail; --worker=all reports all or nothing.
  for try in 1 2 3; do
    if gcloud_tpu tpu-vm ssh "$name" --worker=all "${ssh_flags[@]}" --command=true; then break; fi
    if ((try == 3)); then return 255; fi
    sleep "$poll"
  done
  note 'copying the code, setting up all workers'
  gcloud_tpu tpu-vm scp "$archive" "$name:rlsafety-code.tgz" --worker=all "${ssh_flags[@]}" ||
    return 255
  gcloud_tpu tpu-vm ssh "$name" --worker=all "${ssh_flags[@]}" \
    --command="rm -rf rlsafety-code; mkdir rlsafety-code; tar -xzf rlsafety-code.tgz -C rlsafety-code" ||
    return 255
  on all setup --bucket="$bucket" --image="$image" --hf-secret="$hf_secret" || status=$?
  return "$status"
}

train() {
  local restarts=0 setups=0 answer status
  [[ -n $bucket ]] || die '--bucket is missing: the run directory has to outlive the slice'
  case " ${flags[*]} " in *' --config='*) ;; *) die 'no --config=FILE after --' ;; esac
  case " ${flags[*]} " in *' --workdir='*) ;; *)
    # shellcheck disable=SC2088
    flags+=("--workdir=../bucket/runs/$name") ;;
  esac
  # A VM whose TPU does not start must not train on its CPU.
  case " ${flags[*]} " in *' --config.platform='*) ;; *) flags+=(--config.platform=tpu) ;; esac
  if [[ -n ${HF_TOKEN:-} && -z $hf_secret ]]; then
    note 'HF_TOKEN stays on this machine: put it into Secret Manager and give --hf-secret=NAME'
  fi
  while :; do
    ensure_active
    answer=$(on 0 result "$name" 2>/dev/null | tail -n 1) || answer=none
    if [[ $answer != running && $answer != 'exit 0' ]]; then
      status=0
      prepare || status=$?
      if ((status == 0)); then
        on all start "$name" --image="$image" --hf-secret="$hf_secret" -- "${flags[@]}" || status=$?
      fi
      case $status in
        0)
          note "$name is running; its log, live (Ctrl-C leaves it running):"
          answer=running
          ;;
        "$BAD_INPUT") give_up 'the set-up can never succeed (above: why)' ;;
        255) answer=unreachable ;;
        *)
          ((setups += 1))
          if ((setups >= SETUPS)); then give_up "the set-up failed $setups times (above: why)"; fi
          answer='set-up failed'
          ;;
      esac
    fi
    if [[ $answer == running || $answer == 'exit 0' ]]; then
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
      "exit $PREEMPTED" | lost | none | unreachable | 'set-up failed') ;;
      *)
        if [[ $answer == "exit $BAD_INPUT" ]] || ((restarts >= CRASHES)); then
          give_up "the run failed ($answer)"
        fi
        ;;
    esac
    ((restarts += 1))
    if ((restarts > max_restarts)); then give_up "gave up after $max_restarts restarts"; fi
    note "interrupted ($answer), restart $restarts of at most $max_restarts"
    on all stop "$name" || true
    sleep "$poll"
  done
}

# What the slice has cost: from when its VMs were made, at list price.
cost() {
  local answer
  answer=$(gcloud_tpu tpu-vm describe "$name" --format='value(acceleratorType,createTime)' 2>/dev/null) ||
    return 0
  read -r -a answer <<<"$answer"
  facts 'print(cost_line(*arguments, datetime.datetime.now(datetime.UTC)))' "${answer[@]}" ||
    echo 'unknown'
}

case $command in
  train) train ;;
  status)
    now=$(state)
    echo "slice: $now"
    if [[ $now == ACTIVE ]]; then
      echo "run: $(on 0 result "$name" | tail -n 1)"
      echo "cost: $(cost)"
    fi
    ;;
  logs) on 0 follow "$name" ;;
  stop) on all stop "$name" ;;
  delete) delete_slice ;;
esac
