#!/usr/bin/env bash
# Runs the notebooks where the machine looks like Colab: its Python, its preinstalled packages.
#
#   colabs/as_colab.sh [--venv=DIR] [--list=FILE] [NAME ...]   default: all, in .venv-colab
#
# Makes an environment with Python 3.12 and colab-2026.01.txt, installs the package there by the
# notebooks' own install cell (from this checkout: RLSAFETY_REPOSITORY), and runs NAME.py. The cell
# brings a newer JAX: that of 2026.01 is too old. PYTHON=/path/to/python3.12 chooses the interpreter.
# Colab's default since August 2026 is Python 3.13, whose list we could not read: PYTHON=python3.13
# with an empty list, --list=/dev/null, runs them there with what PyPI serves.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/lib.sh

venv=.venv-colab
list=colabs/colab-2026.01.txt
names=()
for arg in "$@"; do
  case $arg in
    --help | -h) print_help colabs/as_colab.sh; exit 0 ;;
    --venv=*) venv=${arg#*=} ;;
    --list=*) list=${arg#*=} ;;
    *) names+=("$arg") ;;
  esac
done
[[ ${#names[@]} -gt 0 ]] || names=(explore environment study probe)

root=$PWD
venv=$(realpath -m "$venv")
work=$(mktemp -d)
[[ -x $venv/bin/python ]] || "${PYTHON:-python3.12}" -m venv "$venv"
"$venv/bin/python" -m pip install --disable-pip-version-check --quiet --requirement "$list"
"$venv/bin/python" -m pip uninstall --quiet --yes rlsafety # of an earlier call
export RLSAFETY_REPOSITORY=$root MPLBACKEND=Agg JAX_PLATFORMS=cpu
cp colabs/*.py "$work"
cd "$work" # the package is nowhere near, as on a fresh runtime
for name in "${names[@]}"; do
  note "$name"
  "$venv/bin/python" "$name.py"
done
