#!/usr/bin/env bash
# Runs on every TPU VM, called by tpu_pod.sh: sets the machine up and keeps one run going.
#
#   tpu_worker.sh setup [OPTIONS]           make the machine ready, or say why it never will be
#   tpu_worker.sh start NAME [OPTIONS] -- FLAGS   start rlsafety.train FLAGS, unless NAME is running
#   tpu_worker.sh follow NAME         print NAME's log until it ends
#   tpu_worker.sh result NAME         print: none, running, lost, or exit CODE
#   tpu_worker.sh stop NAME           ask NAME to save and end (SIGTERM), wait up to 2 minutes
#   tpu_worker.sh --dry-run COMMAND   print what COMMAND would do, change nothing
#   tpu_worker.sh --help              this text
#
# OPTIONS
#   --bucket=BUCKET    Cloud Storage bucket, mounted on ~/bucket (in a container: /bucket)
#   --image=IMAGE      train in this container, built from launch/k8s/Dockerfile, in place of an
#                      environment that is installed here
#   --hf-secret=NAME   Secret Manager's name of the Hugging Face token: read when a run starts, by
#                      the VM's service account, into the variable HF_TOKEN of that run alone
#
# The run is detached from the ssh session, so a lost connection costs nothing. Its log is
# ~/rlsafety-runs/NAME.log, its process id and exit code lie beside it. Exit code 2 says that the
# same command will fail here again: do not repeat it.
set -euo pipefail
code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$code/launch/lib.sh"

venv=$HOME/rlsafety-venv
mount=$HOME/bucket
runs=$HOME/rlsafety-runs
# On machine types of large slices gcsfuse believes for ever what it once saw under a name, and lets
# folders of a bucket that has none be renamed, file by file (Cloud Storage FUSE, "Automated
# configurations"). Here every worker sees what the first one wrote, and such a bucket is refused.
mount_options=(--implicit-dirs --metadata-cache-ttl-secs=0 --rename-dir-limit=0)
bucket='' image='' hf_secret=''

alive() {
  [[ -f $runs/$1.pid ]] && kill -0 "$(<"$runs/$1.pid")" 2>/dev/null
}

read_token() {
  HF_TOKEN=$(gcloud secrets versions access latest --secret="$hf_secret") && [[ -n $HF_TOKEN ]] ||
    die "the secret $hf_secret cannot be read here; give this VM's service account the role \
roles/secretmanager.secretAccessor on it"
  export HF_TOKEN
}

# Google's package of gcsfuse, as its installation page says: TPU VM images come without it.
bring_gcsfuse() {
  if command -v gcsfuse >/dev/null; then return; fi
  local key=/usr/share/keyrings/cloud.google.asc host=https://packages.cloud.google.com/apt
  note 'installing gcsfuse'
  if ! { curl -fsS "$host/doc/apt-key.gpg" | sudo -n tee "$key" >/dev/null &&
    echo "deb [signed-by=$key] $host gcsfuse-$(lsb_release -cs) main" |
    sudo -n tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null &&
    sudo -n apt-get -q update && sudo -n apt-get -qy install gcsfuse; } >"$runs/gcsfuse.log" 2>&1; then
    tail -n 5 "$runs/gcsfuse.log" >&2
    die 'gcsfuse is not on this VM image and could not be installed: use an image that has it'
  fi
}

setup() {
  cd "$code"
  if [[ ${DRY_RUN:-0} != 1 ]]; then mkdir -p "$runs"; fi
  if [[ -n $hf_secret && ${DRY_RUN:-0} != 1 ]]; then (read_token); fi
  if [[ -n $bucket ]] && ! mountpoint -q "$mount"; then
    [[ ${DRY_RUN:-0} == 1 ]] || bring_gcsfuse
    run mkdir -p "$mount"
    if [[ -n $image ]]; then # the container is root's, and sees the mount only if that is too
      run sudo -n gcsfuse -o allow_other "${mount_options[@]}" "$bucket" "$mount"
    else
      run gcsfuse "${mount_options[@]}" "$bucket" "$mount"
    fi
  fi
  if [[ -n $image ]]; then
    run sudo -n docker pull --quiet "$image" || die "docker could not pull $image: does it exist, \
and may this VM's service account read it? (sudo gcloud auth configure-docker HOST)"
    return
  fi
  if [[ ${DRY_RUN:-0} != 1 ]]; then bring_uv "$HOME/rlsafety-uv"; fi
  make_venv "$venv"
  install "$venv" tpu --editable '.[tpu]'
}

start() {
  local name=$1 command=("$code/launch/tpu_worker.sh" supervise "$1")
  shift
  if alive "$name"; then
    note "$name is running already"
    return
  fi
  # Its own session: it outlives ssh.
  command=(setsid nohup "${command[@]}" --image="$image" --hf-secret="$hf_secret" -- "$@")
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
  local name=$1 child='' status=0 signalled=1 command
  shift
  echo $$ >"$runs/$name.pid"
  trap 'signalled=1; pass_on_term "$name" "$child"' TERM
  cd "$code"
  if [[ -n $hf_secret ]] && ! (read_token); then
    write_exit "$name" 2
    return
  fi
  if [[ -n $hf_secret ]]; then read_token; fi
  command=("$venv/bin/python")
  if [[ -n $image ]]; then
    # --env NAME without a value: docker reads it from the environment, no list of processes does.
    sudo -n docker rm --force "rlsafety-$name" >/dev/null 2>&1 || true # of a killed start
    command=(sudo -n --preserve-env=HF_TOKEN docker run --rm --init --privileged --net=host
      --name="rlsafety-$name" --shm-size=16g --env HF_TOKEN --volume "$mount:/bucket"
      --volume "$HOME/.cache/rlsafety:/root/.cache/rlsafety" "$image" python)
  fi
  "${command[@]}" -m rlsafety.train "$@" &
  child=$!
  while ((signalled)); do
    signalled=0 status=0
    wait "$child" || status=$?
  done
  write_exit "$name" "$status"
}

# sudo does not hand every signal on, so the container gets it from docker.
pass_on_term() {
  if [[ -n $image ]]; then
    sudo -n docker kill --signal=TERM "rlsafety-$1" >/dev/null || true
  elif [[ -n $2 ]]; then
    kill -TERM "$2"
  fi
}

write_exit() {
  echo "$2" >"$runs/$1.exit.part"
  mv "$runs/$1.exit.part" "$runs/$1.exit"
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
verb=${1:-}
case $verb in
  setup | start | supervise | follow | result | stop) shift ;;
  --help | -h) print_help "$code/launch/tpu_worker.sh"; exit 0 ;;
  *) die "unknown command '$verb'; see --help" ;;
esac
arguments=()
while (($#)); do
  case $1 in
    --bucket=*) bucket=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --hf-secret=*) hf_secret=${1#*=} ;;
    --) shift; arguments+=("$@"); break ;;
    -*) die "unknown option '$1'; flags of the training go after --" ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
"$verb" "${arguments[@]}"
