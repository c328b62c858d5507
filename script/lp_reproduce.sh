#!/usr/bin/env bash
# Linear evaluation on the nine public sets of script/data_sets.tsv, in fp32 as published.
#   DATA_ROOT=... WEIGHTS=... OUT=... MODELS="PanDerm_Large_LP PanDerm_Base_LP" bash script/lp_reproduce.sh [options]
# Options are passed on to linear_eval.py. A set without data, or a model without its file, is skipped by name.
set -uo pipefail
cd -P "$(dirname "$0")/.."
. script/common.sh

python="$(pick_python)"

evaluate() {
  local classes="$2" csv="$3" images="$4" model="$5" checkpoint="$6"
  shift 6
  "$python" classification/linear_eval.py --model "$model" ${checkpoint:+--pretrained_checkpoint "$checkpoint"} \
    --nb_classes "$classes" --csv_path "$csv" --root_path "$images" --batch_size 1000 --amp_dtype fp32 \
    --output_dir "$OUT" --csv_filename "$(plain_name "$model")_result.csv" "$@"
}

for_each_set evaluate "$@"
