#!/usr/bin/env bash
# Runs the notebooks where the machine looks like Colab: its Python, its preinstalled packages.
#
#   colabs/as_colab.sh [--venv=DIR] [NAME ...]     default: all notebooks, in .venv-colab
#
# Makes an environment with Python 3.12 and colab-2026.01.txt, installs the package there by the
# notebooks' own install cell (from this checkout: RLSAFETY_REPOSITORY), and runs NAME.py. The cell
# brings a newer JAX: that of 2026.01 is too old. PYTHON=/path/to/python3.12 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/lib.sh

venv=.venv-colab
names=()
for arg in "$@"; do
  case $arg in
    --help | -h) print_help colabs/as_colab.sh; exit 0 ;;
    --venv=*) venv=${arg#*=} ;;
    *) names+=("$arg") ;;
  esac
done
[[ ${#names[@]} -gt 0 ]] || names=(explore environment study probe)

root=$PWD
venv=$(realpath -m "$venv")
work=$(mktemp -d)
[[ -x $venv/bin/python ]] || "${PYTHON:-python3.12}" -m venv "$venv"
"$venv/bin/python" -m pip install --disable-pip-version-check --quiet \
  --requirement colabs/colab-2026.01.txt
"$venv/bin/python" -m pip uninstall --quiet --yes rlsafety # of an earlier call
export RLSAFETY_REPOSITORY=$root MPLBACKEND=Agg JAX_PLATFORMS=cpu
cp colabs/*.py "$work"
cd "$work" # the package is nowhere near, as on a fresh runtime
for name in "${names[@]}"; do
  note "$name"
  "$venv/bin/python" "$name.py"
done
