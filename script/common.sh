# Shared by the scripts, which source it from the repository's root: where things lie, and a ready .venv.

DATA_ROOT="${DATA_ROOT:-data}"             # folder of the data sets of script/data_sets.tsv
WEIGHTS="${WEIGHTS:-pretrain_weight}"      # folder of the checkpoint files
OUT="${OUT:-output_dir}"                   # folder of all results
MODELS="${MODELS:-PanDerm_Large_LP PanDerm_Base_LP}"

# The interpreter: an explicit PYTHON, an activated venv, the repository's .venv, else python3 (conda's, when active).
pick_python() {
  if [ -n "${PYTHON:-}" ]; then echo "$PYTHON"
  elif [ -n "${VIRTUAL_ENV:-}" ]; then echo python3
  elif [ -x .venv/bin/python ]; then echo .venv/bin/python
  else echo python3; fi
}

# The published file of a model inside WEIGHTS; nothing for models whose weights come by name.
checkpoint_of() {
  case "$1" in
    PanDerm_Large_*) echo "$WEIGHTS/panderm_ll_data6_checkpoint-499.pth" ;;
    PanDerm_Base_*)  echo "$WEIGHTS/panderm_bb_data6_checkpoint-499.pth" ;;
    DermINO_*)       echo "$WEIGHTS/dermino_base.pth" ;;
    SwAVDerm)        echo "$WEIGHTS/swavderm_pretrained.pth" ;;
  esac
}

# ensure_venv EXTRA: .venv with the requirements and that extra; installs again only when the requirements changed.
ensure_venv() {
  local extra="$1" base="${PYTHON:-python3}" want
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "needs Python 3.10 or newer" >&2; exit 2; }
  want="$(cat requirements.txt pyproject.toml | cksum | cut -d ' ' -f 1)"
  if grep -qxF -e "$want $extra" -e "$want test" .venv/.installed 2>/dev/null; then return; fi  # test has them all
  [ -x .venv/bin/python ] || "$base" -m venv .venv
  echo "installing into .venv (minutes, the first time) ..."
  (
    if command -v flock >/dev/null; then flock 9; fi      # two pips in one environment break it
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$extra]"
  ) 9> .venv/.lock
  echo "$want $extra" >> .venv/.installed
}

# for_each_set FUNCTION OPTIONS...: of every model of MODELS on every data set of script/data_sets.tsv whose data and
# weights are there, calls FUNCTION set classes csv images model checkpoint OPTIONS (checkpoint empty where it comes by
# name); then says which ran, were skipped (FUNCTION returned 3, saying why in $reason), or failed, and exits.
for_each_set() {
  local function="$1" model checkpoint name classes csv images reason code ran=() skipped=() failed=()
  shift
  for model in $MODELS; do
    checkpoint="$(checkpoint_of "$model")"
    while IFS=$'\t' read -r name classes csv images _; do
      case "$name" in ''|'#'*) continue ;; esac
      if [ ! -f "$DATA_ROOT/$csv" ] || [ ! -d "$DATA_ROOT/$images" ]; then
        skipped+=("$model on $name (no $DATA_ROOT/$csv with $DATA_ROOT/$images)")
        continue
      fi
      if [ "${NEEDS_WEIGHTS:-yes}" = yes ] && [ -n "$checkpoint" ] && [ ! -f "$checkpoint" ]; then
        skipped+=("$model on $name (no weights file $checkpoint)")
        continue
      fi
      echo "== $model on $name"
      reason="" code=0
      "$function" "$name" "$classes" "$DATA_ROOT/$csv" "$DATA_ROOT/$images" "$model" "$checkpoint" "$@" < /dev/null \
        || code=$?
      case "$code" in
        0) ran+=("$model on $name") ;;
        3) skipped+=("$model on $name ($reason)") ;;
        *) failed+=("$model on $name") ;;
      esac
    done < script/data_sets.tsv
  done
  echo
  print_list "ran" ${ran[@]+"${ran[@]}"}
  print_list "skipped" ${skipped[@]+"${skipped[@]}"}
  print_list "failed" ${failed[@]+"${failed[@]}"}
  [ ${#failed[@]} -eq 0 ] || exit 1
  [ ${#ran[@]} -gt 0 ] || { echo "nothing ran: set DATA_ROOT and WEIGHTS (README, section 4)" >&2; exit 2; }
}

print_list() {
  local title="$1" item
  shift
  echo "$title: $#"
  for item in "$@"; do echo "  $item"; done
}

# A model's name as that of a file or folder.
plain_name() { echo "$1" | tr -c 'A-Za-z0-9._\n-' '-'; }
