#!/usr/bin/env bash
# What to do with a GPU that is at hand for ten minutes: most valuable first, each part with its own limit.
#
#   experiments/on_gpu.sh OUT [--pack DIR --val DIR [--init MODEL]] [--wheels DIR] [--only "PART ..."] [--dry]
#
# Appends to OUT/results.txt; OUT/teacher is a run folder of experiments.train_reference (it resumes what it finds).
# DIR of --pack and --val are made before by `python -m experiments.reference_data` and travel with the checkout, as
# may wheels of packages that the machine lacks. --dry takes tiny sizes on the CPU, to see that every line still runs,
# and an hour for what has a minute there: the machine may be busy. --only names the parts that run, as they are below.
# At most nine minutes: 60 s for the forms of attention, 60 for the forward pass, 90 for a step of distillation, 60 each
# for a plan and for what it planned (real memory and time beside it, a line each), 210 for the teacher.
set -u
cd "$(dirname "$0")/.."
out=${1:?where to write}; shift
pack= val= init= wheels= dry= only=
while [ $# -gt 0 ]; do
  case $1 in
    --pack) pack=$2; shift 2 ;;
    --val) val=$2; shift 2 ;;
    --init) init=$2; shift 2 ;;
    --wheels) wheels=$2; shift 2 ;;
    --only) only=$2; shift 2 ;;
    --dry) dry=1; shift ;;
    *) echo "unknown option $1" >&2; exit 2 ;;
  esac
done
for name in $only; do
  [[ " attention forward step plan planned teacher " = *" $name "* ]] || { echo "--only: no part is $name" >&2; exit 2; }
done
mkdir -p "$out"
results=$out/results.txt
python=python3
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
if [ -n "$wheels" ]; then
  $python -m pip install -q --no-deps --no-index --target "$out/.packages" "$wheels"/*.whl
  export PYTHONPATH=$PWD:$out/.packages
fi

wanted() { [ -z "$only" ] || [[ " $only " = *" $1 "* ]]; }

part() { # NAME SECONDS COMMAND...: runs it, and says in the results how it ended
  wanted "$1" || return 0
  local name=$1 limit=$(($2 * patience)) start=$SECONDS code; shift 2
  echo "## $name: $* ($(date -u +%FT%TZ), $(git rev-parse --short HEAD 2>/dev/null || echo no commit))" >>"$results"
  timeout --signal=TERM --kill-after=20 "$limit" "$@" >>"$results" 2>&1
  code=$?
  echo "## $name: ended with $code after $((SECONDS - start)) s" | tee -a "$results"
}

left_out() { # NAMES WHY
  echo "## $1: left out, $2" | tee -a "$results"
}

if [ -n "$dry" ]; then
  export JAX_PLATFORMS=cpu
  patience=60
  slim=small_p50 images=1 turns=1 runs=1 teacher=small on=cpu
  steps="--steps 2 --batch 2 --validations 1 --val-images 1 --workers 1"
else
  patience=1
  slim=vit_p77 images=40 turns=2 runs=20 teacher=vit_b
  on=$(nvidia-smi -L 2>/dev/null | grep -oiE 'h100|h200|a100' | head -1 | tr A-Z a-z)
  steps="--steps 100000 --batch 128 --prompts 8 --workers 14 --validations 200 --val-images 50 --save-every 200"
fi
(nvidia-smi -L || echo "no GPU") >>"$results" 2>/dev/null

part attention 60 $python -m experiments.bench.attention --preset $slim --runs $runs
part forward 60 $python -m experiments.bench --what forward --preset $slim --images $images --turns $turns \
  $([ -n "$dry" ] || echo --compile)
part step 90 $python -m experiments.bench --what bottleneck-stage --preset $slim --images $images --turns $turns
! wanted plan || rm -f "$out/plan.json" # of an earlier call
if [ -n "$on" ]; then
  part plan 60 $python -m slimsam_jax.plan --teacher $teacher --ratio 0.77 --per-device 1 --on "$on" --only distill \
    --out "$out/plan.json"
  if [ -e "$out/plan.json" ]; then
    part planned 60 $python -m experiments.bench.planned "$out/plan.json" --runs $runs
  elif wanted planned; then
    left_out planned "there is no plan.json, which plan writes"
  fi
elif wanted plan || wanted planned; then
  left_out "plan, planned" "this GPU is none that slimsam plan knows"
fi
if [ -n "$pack" ]; then
  resume=; [ -e "$out/teacher/log.jsonl" ] && resume=--resume
  part teacher 210 $python -m experiments.train_reference --composites "$pack" \
    --val "$val" --out "$out/teacher" --schedule warm --learning-rate 5e-4 --ema 0.999 --crop 1 --keep last \
    $steps ${init:+--init "$init"} $resume
elif wanted teacher; then
  left_out teacher "there is no --pack"
fi
