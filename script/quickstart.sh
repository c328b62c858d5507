#!/usr/bin/env bash
# From nothing to a metric table: .venv, demo images, linear evaluation with a small pretrained backbone (CPU is enough).
set -euo pipefail
cd -P "$(dirname "$0")/.."
. script/common.sh

ensure_venv demo
.venv/bin/python -m furnace.data.synthetic demo_data
.venv/bin/python classification/linear_eval.py \
  --model pretrain_weight/derm_small --nb_classes 6 \
  --csv_path demo_data/synthetic_lesions.csv --root_path demo_data \
  --output_dir "$OUT/quickstart" "$@"
