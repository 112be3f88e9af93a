#!/usr/bin/env bash
# Trains every member in order, calibrates them, and leaves a bundle that submit.py reads.
#
#   DATA=manifest.csv PRESET=compact OUT=runs/compact TOWER=path/to/dinov2-small bash train.sh
#   bash train.sh --smoke     the whole of it in a few minutes on CPU, on generated pictures and tiny towers
#
# DATA     manifest (CSV path,label,..., DeepfakeBench JSON, or a folder with real/ and fake/), with train and val splits
# PRESET   giant (towers from the Hub) or compact (TOWER: a DINOv2-S/14 folder as facebook/dinov2-small on the Hub)
# OUT      where members, checkpoints and the bundle OUT/bundle go; the same call goes on where it stopped
# MEMBERS  which, in order (default: global face fusion qtfp vlaforge; fusion starts from the trained global)
# SEED     of everything (default 0)
# EXTRA    further arguments of python -m solution.train, e.g. "--set train.epochs=2 --workers 4"
# NPROC    processes of torchrun (default 1)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=${PYTHON:-python}

if [[ ${1:-} == --smoke ]]; then
  OUT=${OUT:-runs/smoke} PRESET=tiny
  "$python" tests/make_smoke_data.py --out "$OUT/data" # seeded drawings, half of them with a pasted patch
  DATA=$OUT/data/manifest.csv
  EXTRA="--workers 0 ${EXTRA:-}"
elif [[ $# -gt 0 ]]; then
  echo "train.sh: unknown argument $1; it takes its settings from variables, see its first lines" >&2
  exit 2
fi

: "${DATA:?train.sh: set DATA to a manifest (CSV path,label,source,split; a DeepfakeBench JSON; a folder real/ fake/)}"
: "${PRESET:?train.sh: set PRESET to giant or compact}"
OUT=${OUT:-runs/$PRESET}
MEMBERS=${MEMBERS:-global face fusion qtfp vlaforge}
run=("$python")
if [[ ${NPROC:-1} -gt 1 ]]; then
  run=("$python" -m torch.distributed.run --standalone --nproc-per-node "$NPROC")
fi

for member in $MEMBERS; do
  from=()
  case $PRESET in
    compact)
      if [[ $member == global ]]; then
        : "${TOWER:?train.sh: set TOWER to the folder of DINOv2-S/14 (as facebook/dinov2-small on the Hub)}"
        from=(--tower "compact-dinov2-s14=$TOWER")
      else # the tower that global trained whole
        from=(--tower "compact-dinov2-s14=$OUT/towers/compact-dinov2-s14.safetensors")
      fi
      ;;
    tiny)
      if [[ $member == global ]]; then
        from=(--random-towers)
      else
        from=(--tower "tiny-dinov2=$OUT/towers/tiny-dinov2.safetensors")
      fi
      ;;
    giant)
      if [[ $member == fusion ]]; then from=(--start-from "$OUT/global"); fi
      ;;
  esac
  # shellcheck disable=SC2086
  "${run[@]}" -m solution.train --member "$member" --preset "$PRESET" --data "$DATA" --out "$OUT" \
    --set "train.seed=${SEED:-0}" ${from[@]+"${from[@]}"} ${EXTRA:-}
done

"$python" -m solution.assemble --members "$OUT" --names "${MEMBERS// /,}" --data "$DATA" --out "$OUT/bundle"
echo "train.sh: done; score pictures with: python submit.py --weights $OUT/bundle --input DIR --out preds.csv"
