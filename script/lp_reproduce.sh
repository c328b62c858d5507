#!/usr/bin/env bash
# Linear evaluation on the nine public sets of script/data_sets.tsv, in fp32 as published.
#   DATA_ROOT=... WEIGHTS=... OUT=... MODELS="PanDerm_Large_LP PanDerm_Base_LP" bash script/lp_reproduce.sh [options]
# Options are passed on to linear_eval.py. A set without data, or a model without its file, is skipped by name.
set -uo pipefail
cd -P "$(dirname "$0")/.."
. script/common.sh

python="$(pick_python)"
ran=() skipped=() failed=()
for model in $MODELS; do
  checkpoint="$(checkpoint_of "$model")"
  weights=()
  if [ -n "$checkpoint" ]; then weights=(--pretrained_checkpoint "$checkpoint"); fi
  table="$(echo "$model" | tr -c 'A-Za-z0-9._\n-' '-')_result.csv"
  while IFS=$'\t' read -r name classes csv images _; do
    case "$name" in ''|'#'*) continue ;; esac
    if [ ! -f "$DATA_ROOT/$csv" ] || [ ! -d "$DATA_ROOT/$images" ]; then
      skipped+=("$model on $name (no $DATA_ROOT/$csv with $DATA_ROOT/$images)")
      continue
    fi
    if [ -n "$checkpoint" ] && [ ! -f "$checkpoint" ]; then
      skipped+=("$model on $name (no weights file $checkpoint)")
      continue
    fi
    echo "== $model on $name"
    if "$python" classification/linear_eval.py --model "$model" ${weights[@]+"${weights[@]}"} --nb_classes "$classes" \
        --csv_path "$DATA_ROOT/$csv" --root_path "$DATA_ROOT/$images" --batch_size 1000 --amp_dtype fp32 \
        --output_dir "$OUT" --csv_filename "$table" "$@" < /dev/null
    then ran+=("$model on $name"); else failed+=("$model on $name"); fi
  done < script/data_sets.tsv
done

print_list() { local title="$1"; shift; echo "$title: $#"; for item in "$@"; do echo "  $item"; done; }
echo
print_list "ran" ${ran[@]+"${ran[@]}"}
print_list "skipped" ${skipped[@]+"${skipped[@]}"}
print_list "failed" ${failed[@]+"${failed[@]}"}
[ ${#failed[@]} -eq 0 ] || exit 1
[ ${#ran[@]} -gt 0 ] || { echo "nothing ran: set DATA_ROOT and WEIGHTS (README, section 4)" >&2; exit 2; }
