#!/usr/bin/env bash
# Test what script/finetune_train.sh left, with test-time augmentation.
#   DATA_ROOT=... WEIGHTS=... OUT=... MODELS="PanDerm_Large_FT" bash script/finetune_test.sh [options]
# Options are passed on to run_class_finetuning.py (--tta_views deterministic, --test_csv_path other.csv, ...).
set -uo pipefail
cd -P "$(dirname "$0")/.."
MODELS="${MODELS:-PanDerm_Large_FT}"
NEEDS_WEIGHTS=no  # a fine-tuned checkpoint has them all
. script/common.sh

python="$(pick_python)"

test_set() {
  local name="$1" classes="$2" csv="$3" images="$4" model="$5" folder
  shift 6
  folder="$OUT/finetuning/$name/$(plain_name "$model")"
  if [ ! -f "$folder/checkpoint-best.pth" ]; then
    reason="no $folder/checkpoint-best.pth: script/finetune_train.sh first"
    return 3
  fi
  "$python" classification/run_class_finetuning.py --model "$model" --nb_classes "$classes" --csv_path "$csv" \
    --root_path "$images" --output_dir "$folder" --eval --resume "$folder/checkpoint-best.pth" --TTA "$@"
}

for_each_set test_set "$@"
