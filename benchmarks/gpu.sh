#!/usr/bin/env bash
# Everything that is measured on one GPU, in parts with a time limit each: bash benchmarks/gpu.sh OUT PART[=SECONDS]...
# A part that fails or runs out of time leaves its rows in OUT and does not stop the next. The seconds below were enough on one H100.
#   tests=90       the GPU tests of attention's kernels, names of failures printed
#   sanitize=320   compute-sanitizer's memcheck over attention and whole sparse steps at small shapes
#   attention=230  one call at 15 and 8 %, all shapes, all rivals, also with 6 root-N key clusters    densities=150  the same at 30 and 5 %
#   cog=60 wan1=130 wan14=200 hunyuan=240 hunyuan193=290            denoising steps of real transformers, random weights
#   rivals=70                                                       the same for the paper's settings and SVG2's, Wan2.1-1.3B
#   wan14rivals=140 hunyuanrivals=150 hunyuan193rivals=220          on the large models, one or two steps each
#   cogc=90 wan1c=110 wan14c=215 hunyuanc=250 hunyuan193c=430        the same compiled, over stock diffusers as it comes
#   wan14tail=190 hunyuantail=260 hunyuan193tail=420                twenty compiled sparse steps, for percentiles
#   crossover=70                                                    from how much work on sparse attention pays
#   stock193=115                                                    a step of stock diffusers at HunyuanVideo's 193 frames
#   scaling=330                                                     one video on one GPU and on 2, 4 and 8 (90 s more for each;
#                                                                   RANKS="4 8" leaves out the others)
# A rehearsal without a GPU: EXTRA=--tiny SHAPES=tiny bash benchmarks/gpu.sh out/rehearsal attention wan14
set -u
OUT=${1:?a folder for rows}; shift
mkdir -p "$OUT"
export OUT EXTRA=${EXTRA:-} SHAPES=${SHAPES:-} COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || true)}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}
bench() { python3 -m adamac.cli bench attention "$@" --out "$OUT/attention.jsonl"; }
steps() {
  local file=$1; shift
  python3 -m benchmarks.end_to_end run --out "$OUT/$file.jsonl" ${COMMIT:+--commit $COMMIT} $EXTRA "$@"
}
# Without PyTorch's cache of memory each tensor is an allocation of its own, whose ends are watched; a graph and a full card need the cache.
memcheck() {
  compute-sanitizer --tool memcheck python3 -m pytest -q -p no:cacheprovider tests/ops/test_cluster_attention.py tests/attention/test_device.py -k "$1"
}
# Each model on a GPU of its own, side by side; then both spread over 2, 4 and 8, as many as there are. Before anything is timed,
# small models of all families have to make the same video spread as alone.
scaling() {
  local ranks gpus device=cuda
  gpus=$(python3 -c "import torch; print(torch.cuda.device_count())")
  [ -n "$EXTRA" ] && device=cpu gpus=${GPUS:-2}
  (( gpus < 2 )) && { echo "needs two GPUs, there are $gpus"; return 1; }
  spread() { python3 -m torch.distributed.run --standalone --nproc-per-node "$1" -m benchmarks.end_to_end "${@:2}"; }
  local many="run --out $OUT/scaling.jsonl ${COMMIT:+--commit $COMMIT} $EXTRA $QUICK --dense-steps 1 --arms best_dense default_15"
  alone() { CUDA_VISIBLE_DEVICES=$2 python3 -m benchmarks.end_to_end ${many/scaling.jsonl/scaling_$1.jsonl} --models $1 --sparse-steps 3 --minutes 1.5; }
  spread "$gpus" check --device $device || return 1
  for ranks in ${RANKS:-1 2 4 8}; do
    if (( ranks == 1 )); then
      alone wan-14b 0 & alone hunyuan-129f 1 & wait
    elif (( ranks <= gpus )); then
      spread $ranks $many --models wan-14b hunyuan-129f --sparse-steps 4 --minutes 2.5
    fi
  done
}
export -f bench steps scaling memcheck
export QUICK="--rounds 1 --first-steps 0 --no-guidance"
TAIL="--arms default_15+compile $QUICK --dense-steps 1 --sparse-steps $([ -n "$EXTRA" ] && echo 8 || echo 20)"  # a rehearsal's video has ten
COMPILED="--arms best_dense+compile default_15+compile default_8+compile stock"
for each in "$@"; do
  part=${each%%=*}; limit=${each#*=}; [ "$limit" = "$each" ] && limit=200
  minutes=$(python3 -c "print(max($limit - 12, 1) / 60)"); began=$SECONDS
  echo "== $(date +%T) $part, at most $limit s"
  case $part in
    tests) run="python3 -m pytest -q -rf --tb=short -n ${WORKERS:-8} -p no:cacheprovider tests/ops tests/attention/test_device.py" ;;
    sanitize) run="PYTORCH_NO_CUDA_MEMORY_CACHING=1 memcheck '(bits or later_step) and not graph and not without_room' && memcheck 'bits and (graph or without_room)'" ;;
    attention) run='for s in ${SHAPES:-wan-14b hunyuan-129f hunyuan-193f wan-1.3b cogvideox-2b}; do bench --shapes $s --densities 0.15 0.08 --key-roots 6 --rounds 3; done' ;;
    densities) run='for s in ${SHAPES:-wan-14b hunyuan-129f cogvideox-2b}; do bench --shapes $s --densities 0.3 0.05 --rounds 2; done' ;;
    cog) run="steps end_to_end --models cogvideox-2b --arms stock best_dense default_15 default_8 --rounds 2 --dense-steps 5 --sparse-steps 15" ;;
    cogc) run="steps compiled --models cogvideox-2b $COMPILED --rounds 1 --dense-steps 5 --sparse-steps 15" ;;
    wan1) run="steps end_to_end --models wan-1.3b --arms stock best_dense default_15 default_8 --rounds 2 --dense-steps 5 --sparse-steps 20" ;;
    rivals) run="steps end_to_end --models wan-1.3b --arms best_dense default_15 paper svg2 --rounds 1 --dense-steps 3 --sparse-steps 5" ;;
    wan14rivals) run="steps end_to_end --models wan-14b --arms best_dense paper svg2 $QUICK --dense-steps 1 --sparse-steps 2" ;;
    hunyuanrivals) run="steps end_to_end --models hunyuan-129f --arms best_dense default_15 svg2 $QUICK --dense-steps 1 --sparse-steps 2" ;;
    wan1c) run="steps compiled --models wan-1.3b $COMPILED --rounds 1 --dense-steps 5 --sparse-steps 10" ;;
    wan14) run="steps end_to_end --models wan-14b --arms best_dense default_15 default_8 stock paper $QUICK --dense-steps 3 --sparse-steps 4" ;;
    wan14c) run="steps compiled --models wan-14b $COMPILED $QUICK --dense-steps 2 --sparse-steps 4" ;;
    hunyuanc) run="steps compiled --models hunyuan-129f $COMPILED $QUICK --dense-steps 1 --sparse-steps 3" ;;
    hunyuan193rivals) run="steps end_to_end --models hunyuan-193f --arms best_dense svg2 $QUICK --dense-steps 1 --sparse-steps 1" ;;
    scaling) run="scaling" ;;
    hunyuan193c) run="steps compiled --models hunyuan-193f --arms default_15+compile default_8+compile best_dense+compile stock $QUICK --dense-steps 1 --sparse-steps 2" ;;
    wan14tail) run="steps compiled --models wan-14b $TAIL" ;;
    hunyuantail) run="steps compiled --models hunyuan-129f $TAIL" ;;
    hunyuan193tail) run="steps compiled --models hunyuan-193f $TAIL" ;;
    hunyuan) run="steps end_to_end --models hunyuan-129f --arms default_15 default_8 best_dense stock paper --rounds 1 --first-steps 0 --dense-steps 1 --sparse-steps 3" ;;
    hunyuan193) run="steps end_to_end --models hunyuan-193f --arms default_8 default_15 best_dense stock --rounds 1 --first-steps 0 --dense-steps 1 --sparse-steps 3" ;;
    crossover) run='python3 benchmarks/crossover.py --out "$OUT/crossover.jsonl"' ;;
    stock193) run="steps end_to_end --models hunyuan-193f --arms stock $QUICK --dense-steps 1" ;;
    *) echo "no part $part" >&2; exit 2 ;;
  esac
  case $run in steps*) run="$run --minutes $minutes" ;; esac
  timeout -s INT -k 10 "$limit" bash -c "$run" || echo "$part ended with $?"
  echo "== $part took $((SECONDS - began)) s"
done
