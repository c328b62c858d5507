#!/usr/bin/env bash
# PanDerm's published segmentation on ISIC 2018 (task 1), as its authors ran it, without its faults. Edit, or set:
#   PARENT_PATH=... PRETRAINED=... SAVE_NAME=... DATASET=... bash run.sh [options]
# With several GPUs: LAUNCH="torchrun --nproc_per_node 2" bash run.sh --batch_size 1
set -euo pipefail
cd -P "$(dirname "$0")/.."
. script/common.sh

${LAUNCH:-$(pick_python)} segmentation/run.py \
  --recipe panderm \
  --model cae_seg \
  --pretrained "${PRETRAINED:-$WEIGHTS/panderm_ll_data6_checkpoint-499.pth}" \
  --size 224 \
  --dataset "${DATASET:-ISIC2018}" \
  --parent_path "${PARENT_PATH:-$DATA_ROOT}" \
  --save_name "${SAVE_NAME:-$OUT/segmentation/isic2018_panderm}" \
  --workers 8 \
  --epoch 100 \
  --lr 1e-4 \
  --weight_decay 0.05 \
  --seed 0 \
  "$@"
