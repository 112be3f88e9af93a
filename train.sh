#!/usr/bin/env bash
# Trains every member, calibrates them, and leaves a bundle that submit.py reads.
#
#   DATA=manifest.csv PRESET=compact OUT=runs/compact TOWER=path/to/dinov2-small bash train.sh
#   bash train.sh --smoke     the whole of it in a few minutes on CPU, on generated pictures and tiny towers
#
# DATA     manifest (CSV path,label,..., DeepfakeBench JSON, or a folder with real/ and fake/), with train and val splits
#          and, better, an `unseen` split of other generators, which then helps to choose the best checkpoint
# PRESET   giant, dinov3, gend (towers from the Hub) or compact (TOWER: a DINOv2-S/14 folder as facebook/dinov2-small on
#          the Hub); members of several presets: one call each with the same OUT and BUNDLE=0, then solution.assemble
# OUT      where members, checkpoints and the bundle OUT/bundle go; the same call goes on where it stopped
# MEMBERS  which (default: all of the preset); what others start from is trained first
# SEED     of everything (default 0)
# EXTRA    further arguments of python -m solution.train, e.g. "--set train.epochs=2 --workers 4"; EXTRA_global (and so
#          on) for one member
# JOBS     members trained at once on one device (default 1)
# NPROC    processes of torchrun (default 1)
# BUNDLE   0: stop after training
# ASSEMBLE further arguments of python -m solution.assemble, e.g. "--int8" for towers of half the size
# LIMIT    pictures on which the last step takes every mechanism of the bundle away, OUT/mechanisms (default 200)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=${PYTHON:-python}

if [[ ${1:-} == --smoke ]]; then
  OUT=${OUT:-runs/smoke} PRESET=tiny
  "$python" tests/make_smoke_data.py --out "$OUT/data" # seeded drawings, half of them with a pasted patch
  DATA=$OUT/data/manifest.csv
  EXTRA="--workers 0 ${EXTRA:-}"
  LIMIT=${LIMIT:-24}
elif [[ $# -gt 0 ]]; then
  echo "train.sh: unknown argument $1; it takes its settings from variables, see its first lines" >&2
  exit 2
fi

: "${DATA:?train.sh: set DATA to a manifest (CSV path,label,source,split; a DeepfakeBench JSON; a folder real/ fake/)}"
: "${PRESET:?train.sh: set PRESET to giant, compact, dinov3 or gend}"
OUT=${OUT:-runs/$PRESET}
case $PRESET in
  dinov3 | gend) MEMBERS=${MEMBERS:-$PRESET} ;; # the member has its preset's name
  *) MEMBERS=${MEMBERS:-global face fusion qtfp vlaforge} ;;
esac
run=("$python")
if [[ ${NPROC:-1} -gt 1 ]]; then
  run=("$python" -m torch.distributed.run --standalone --nproc-per-node "$NPROC")
fi

train() { # NAME FOLDER [arguments]
  local name=$1 folder=$2 extra=EXTRA_$1
  shift 2
  # shellcheck disable=SC2086
  "${run[@]}" -m solution.train --member "$name" --preset "$PRESET" --data "$DATA" --out "$folder" \
    --set "train.seed=${SEED:-0}" "$@" ${EXTRA:-} ${!extra:-}
}

cut_tower() { # NAME OTHER BLOCKS: the first blocks of tower NAME, as OTHER
  "$python" -m solution.weights cut "$OUT/towers/$1.safetensors" --blocks "$3" --out "$OUT/towers/$2.safetensors"
}

member() { # NAME: what it starts from, by preset
  local of=s14 towers=$OUT/towers
  if [[ $PRESET == tiny ]]; then of=tiny; fi
  local global="$of-global=$towers/$of-global.safetensors" face="$of-face=$towers/$of-face.safetensors"
  local semantic="$of-semantic=$towers/$of-semantic.safetensors"
  case $PRESET/$1 in
    giant/global | giant/face) # a first run, and a second from its weights at a fifth of the rate, as published
      train "$1" "$OUT/first"
      train "$1" "$OUT" --start-from "$OUT/first/$1" --set optim.lr=1e-6
      ;;
    giant/fusion) train fusion "$OUT" --start-from "$OUT/global" ;;
    compact/global | tiny/global) train global "$OUT" --tower "$global" ;;
    compact/fusion | tiny/fusion) train fusion "$OUT" --tower "$face" --tower "$semantic" ;;
    compact/face | tiny/face) train face "$OUT" --tower "$face" ;;
    compact/vlaforge | tiny/vlaforge) # a first run for its maps alone, which need more steps than its scores
      train vlaforge "$OUT/first" --tower "$face" --set vlaforge.w_global=0 --set vlaforge.w_local=0 \
        --set train.max_steps=500 --set train.validate_every=500 --set degradation.global_p=0.6
      train vlaforge "$OUT" --tower "$face" --start-from "$OUT/first/vlaforge"
      ;;
    compact/*)
      : "${TOWER:?train.sh: set TOWER to the folder of DINOv2-S/14 (as facebook/dinov2-small on the Hub)}"
      train "$1" "$OUT" --tower "s14-$1=$TOWER"
      ;;
    tiny/*) train "$1" "$OUT" --random-towers ;;
    *) train "$1" "$OUT" ;;
  esac
  case $PRESET/$1 in # the towers of global, of face, fusion and vlaforge, and fusion's second: trained whole, then cut
    compact/wide) cut_tower s14-wide s14-global 11 ;;
    compact/tight) cut_tower s14-tight s14-face 10 ;;
    compact/norms) cut_tower s14-norms s14-semantic 8 ;;
    tiny/wide) cut_tower tiny-wide tiny-global 2 ;;
    tiny/tight) cut_tower tiny-tight tiny-face 3 ;;
    tiny/norms) cut_tower tiny-norms tiny-semantic 2 ;;
  esac
}

stage() { # NAME...: at most JOBS at once; one that fails fails all
  local name pids=()
  for name in "$@"; do
    if [[ ${JOBS:-1} -le 1 ]]; then
      member "$name"
      continue
    fi
    member "$name" &
    pids+=($!)
    if [[ ${#pids[@]} -ge $JOBS ]]; then
      wait "${pids[0]}"
      pids=("${pids[@]:1}")
    fi
  done
  for name in ${pids[@]+"${pids[@]}"}; do wait "$name"; done
}

first=() second=()
for name in $MEMBERS; do
  before=$name
  case $PRESET/$name in # whose towers it looks through
    compact/global | tiny/global) before=wide ;;
    compact/face | compact/vlaforge | tiny/face | tiny/vlaforge) before=tight ;;
    compact/fusion | tiny/fusion) before="tight norms" ;;
    */fusion) before= ;;
  esac
  for one in $before; do
    if [[ " ${first[*]-} " != *" $one "* ]]; then first+=("$one"); fi
  done
  if [[ $before != "$name" ]]; then second+=("$name"); fi
done
stage ${first[@]+"${first[@]}"}
stage ${second[@]+"${second[@]}"}
if [[ ${BUNDLE:-1} == 0 ]]; then exit 0; fi

# shellcheck disable=SC2086
"$python" -m solution.assemble --members "$OUT" --names "${MEMBERS// /,}" --data "$DATA" --out "$OUT/bundle" ${ASSEMBLE:-}
"$python" -m solution.studies.mechanisms --weights "$OUT/bundle" --data "$DATA" --limit "${LIMIT:-200}" \
  --out "$OUT/mechanisms"
echo "train.sh: done; score pictures with: python submit.py --weights $OUT/bundle --input DIR --out preds.csv"
