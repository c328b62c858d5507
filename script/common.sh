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
