#!/usr/bin/env bash
# The published study as 17 SLURM jobs, one for each model, in place of 216 runs.
#
#   launch/studies.sh [--dry-run] [options of sbatch]
#
# Each job trains all cells of its model in one program (configs/studies/paper.py) and is requeued
# until they are done; DIR/MODEL/index.html shows them, and started again nothing is done twice.
# DIR is RLSAFETY_STUDIES, default runs/paper. Options of sbatch as in launch/slurm.sbatch, such as
#   --partition=gpu --gpus-per-node=1 --cpus-per-task=16 --mem=128G --time=12:00:00
# Some models are gated: HF_TOKEN, where it is set, comes along.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/lib.sh

options=()
for arg in "$@"; do
  case $arg in
    --help | -h) print_help launch/studies.sh; exit 0 ;;
    --dry-run) DRY_RUN=1 ;;
    *) options+=("$arg") ;;
  esac
done

models=(
  qwen1.5-0.5b-chat qwen1.5-1.8b-chat gemma-1.1-2b-it qwen1.5-4b-chat yi-6b-chat qwen1.5-7b-chat
  gemma-1.1-7b-it llama-2-7b-chat llama-3-8b-instruct llama-2-13b-chat qwen1.5-14b-chat
  qwen1.5-1.8b gemma-2b llama-2-7b qwen1.5-7b llama-2-13b qwen1.5-14b
)
for model in "${models[@]}"; do
  run sbatch --job-name="$model" "${options[@]}" launch/slurm.sbatch \
    --study="configs/studies/paper.py:$model" --workdir="${RLSAFETY_STUDIES:-runs/paper}/$model"
done
