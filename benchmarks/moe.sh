#!/usr/bin/env bash
# The mixture of experts on the GPUs of one host, in order of worth, each part with a time limit of its own:
#   bash benchmarks/moe.sh OUT [PART...]      parts: nvlink shm none sockets quality advise layouts grid uneven models scaling captured
# LIMIT (490) is the seconds for everything. quality reads text files in TEXT (a folder) and trains STEPS (1200) steps of each arm.
# NVLink multicast stays off: it is not what is measured. A rehearsal on a processor:
#   REHEARSE=1 bash benchmarks/moe.sh out/rehearsal nvlink none
set -u
OUT=${1:?a folder for rows}; shift
LIMIT=${LIMIT:-490}; COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
mkdir -p "$OUT"; LOG=$OUT/moe_log.txt; : > "$LOG"
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 DS_BUILD_OPS=0
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=true PYTHONPATH=$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}
PLAN=quick; DEVICE=cuda; TWO="cuda:0 cuda:1"; SMALL=
if [ -n "${REHEARSE:-}" ]; then PLAN=tiny; DEVICE=cpu; TWO="cpu cpu"; SMALL=--tiny; STEPS=${STEPS:-6}; export OMP_NUM_THREADS=1; fi

left() { echo $((LIMIT - SECONDS)); }

# part NAME SECONDS COMMAND...: whatever it does, the next goes on.
part() {
  local name=$1 want=$2 have began=$SECONDS rc; shift 2
  have=$(left); (( have < 20 )) && { echo "$name: no time left"; return; }
  (( want > have )) && want=$have
  echo "=== $name" >> "$LOG"
  timeout -k 5 "$want" "$@" >> "$LOG" 2>&1; rc=$?
  echo "$name: exit $rc after $((SECONDS - began)) s of $want"
}

# layers NAME SECONDS FABRIC PARTS...: the benchmark of the layer on one fabric, by the plan WHAT.
layers() {
  local name=$1 want=$2 fabric=$3 plan=${WHAT:-$PLAN}; shift 3
  [ -n "${REHEARSE:-}" ] && [ "$fabric" != none ] && fabric=gloo
  (( want > $(left) )) && want=$(left)  # so that the benchmark itself stops, and says what it left out
  part "$name" "$want" python3 -m benchmarks.moe run --plan $plan --device $DEVICE --fabrics "$fabric" --parts "$@" \
    --minutes "$(python3 -c "print(max(0.2, ($want - 20) / 60))")" --limit-s 60 --commit "$COMMIT" --out "$OUT/moe.jsonl"
}

quality() {
  local corpus=$OUT/corpus seconds
  [ -f "$corpus/corpus.json" ] || CUDA_VISIBLE_DEVICES="" python3 -c "
from pathlib import Path
from adamac.moe.lm.corpus import prepare
prepare(Path('$corpus'), [Path('${TEXT:?a folder of text files}')], vocab=8192)" >> "$LOG" 2>&1 || { echo "quality: no corpus"; return; }
  seconds=$(( $(left) - 20 )); (( seconds < 40 )) && { echo "quality: no time left"; return; }
  part quality $((seconds + 15)) python3 benchmarks/moe_quality.py "$corpus" --work "$OUT/quality" --devices $TWO $SMALL \
    --steps "${STEPS:-1200}" --minutes "$(python3 -c "print($seconds / 60)")" --out "$OUT/moe_quality.jsonl"
}

# Constants are fitted on two ranks, and say what 2, 4 and 8 take before that is timed; then training steps. A fabric takes up to
# 410 s on four GPUs, 580 s on eight: FABRICS=nvlink LIMIT=590 and FABRICS=shm LIMIT=590 are two calls. RANKS="4 8" leaves out 2;
# constants that an earlier call left in OUT are taken, so two fabrics can be on two pairs of GPUs at once and then on all in turn.
scaling() {
  local fabric file ranks gpus=${GPUS:-$([ -n "${REHEARSE:-}" ] && echo 2 || python3 -c "import torch; print(torch.cuda.device_count())")}
  (( gpus < 2 )) && { echo "scaling: needs two GPUs, there are $gpus"; return; }
  for fabric in ${FABRICS:-nvlink shm}; do
    file=$OUT/machine_$fabric.json
    [ -f "$file" ] || part "constants $fabric" 70 env NCCL_P2P_DISABLE=$([ "$fabric" = shm ] && echo 1 || echo 0) \
      python3 -m torch.distributed.run --standalone --nproc-per-node 2 -m adamac.cli advise moe --measure --device $DEVICE --out "$file"
    for ranks in ${RANKS:-2 4 8}; do
      (( ranks > gpus )) && continue
      layers "$fabric, $ranks ranks" 70 "$fabric" layer --ranks $ranks $([ -f "$file" ] && echo "--machine $file")
      WHAT=${REHEARSE:+tiny} WHAT=${WHAT:-full} layers "training, $fabric, $ranks ranks" 100 "$fabric" train --ranks $ranks
    done
  done
}

for what in ${*:-nvlink shm none sockets quality advise}; do
  case $what in
    nvlink) layers nvlink 140 nvlink cost collectives launches layer rivals ;;
    shm) layers shm 150 shm cost layer train rivals ;;
    none) layers none 120 none cost kernels launches layer serve ;;
    sockets) layers sockets 70 sockets collectives layer ;;
    grid) for each in nvlink=160 shm=160 sockets=300; do WHAT=grid layers "grid ${each%=*}" "${each#*=}" "${each%=*}" cost layer; done ;;
    uneven) for each in nvlink=110 sockets=290; do WHAT=grid layers "uneven ${each%=*}" "${each#*=}" "${each%=*}" cost layer --routing trained_like; done ;;
    captured) for each in nvlink=70 shm=60 none=40 sockets=110; do layers "captured ${each%=*}" "${each#*=}" "${each%=*}" captured; done
      for each in nvlink=120 shm=110; do WHAT=${REHEARSE:+tiny} WHAT=${WHAT:-grid} layers "captured grid ${each%=*}" "${each#*=}" "${each%=*}" captured; done ;;
    models) WHAT=full layers "models none" 90 none train serve; WHAT=full layers "models shm" 150 shm train ;;
    quality) quality ;;
    advise) part advise 70 python3 -m torch.distributed.run --nproc-per-node 2 -m adamac.cli advise moe --measure \
      --device $DEVICE --out "$OUT/moe_machine.json" ;;
    scaling) scaling ;;
    layouts) part layouts 150 python3 -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.moe_layouts \
      --device $DEVICE $SMALL --expert-ranks 1 2 --out "$OUT/moe_layouts.jsonl" ;;
    *) echo "no part $what" >&2; exit 2 ;;
  esac
done
if [ -f "$OUT/moe.jsonl" ]; then python3 -m benchmarks.moe summary "$OUT/moe.jsonl"; fi
