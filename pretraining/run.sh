#!/usr/bin/env bash
# Hybrid pretraining with a configuration of this folder. Edit, or set:
#   CONFIG=... DATA_CSV=... OUTPUT_DIR=... bash run.sh [options]
# Paths are relative to the repository's root; CONFIG may also be relative to this folder.
# With several GPUs: LAUNCH="torchrun --nproc_per_node 8" CONFIG=configs/dermino_base.yaml bash run.sh
set -euo pipefail
cd -P "$(dirname "$0")/.."
. script/common.sh

config="${CONFIG:-configs/demo_cpu.yaml}"
[ -f "$config" ] || config="pretraining/$config"

demo=demo_data/synthetic_lesions.csv
if [ -z "${DATA_CSV:-}" ] && [ ! -f "$demo" ]; then
  echo "no DATA_CSV given: drawing the demo data set into demo_data" >&2
  "$(pick_python)" -m furnace.data.synthetic demo_data
fi

${LAUNCH:-$(pick_python)} pretraining/run.py -c "$config" \
  --data_csv "${DATA_CSV:-$demo}" \
  --output_dir "${OUTPUT_DIR:-$OUT/pretraining/$(basename "$config" .yaml)}" \
  "$@"
