#!/usr/bin/env bash
# Fine-tuning with the published recipe on the public sets of script/data_sets.tsv, one run per model and set.
#   DATA_ROOT=... WEIGHTS=... OUT=... MODELS="PanDerm_Large_FT" bash script/finetune_train.sh [options]
# Options are passed on to run_class_finetuning.py. A run that was cut off goes on; a finished one prints its results.
set -uo pipefail
cd -P "$(dirname "$0")/.."
MODELS="${MODELS:-PanDerm_Large_FT}"
. script/common.sh

python="$(pick_python)"

train() {
  local name="$1" classes="$2" csv="$3" images="$4" model="$5" checkpoint="$6"
  shift 6
  "$python" classification/run_class_finetuning.py --model "$model" \
    ${checkpoint:+--pretrained_checkpoint "$checkpoint"} --nb_classes "$classes" --csv_path "$csv" \
    --root_path "$images" --output_dir "$OUT/finetuning/$name/$(plain_name "$model")" \
    --batch_size 128 --lr 5e-4 --epochs 50 --warmup_epochs 10 --layer_decay 0.65 --drop_path 0.2 \
    --weight_decay 0.05 --mixup 0.8 --cutmix 1.0 --weights --TTA "$@"
}

for_each_set train "$@"
