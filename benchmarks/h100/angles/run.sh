#!/bin/bash
# run.sh LIMIT_SECONDS  [tiny]     from the repository root; writes $OUT/analyze-overhead.json and $OUT/angles.json
# $GGUF: a GGUF of SmolLM2-135M; absent: random weights of that shape.
set -u
LIMIT=${1:-}
[[ "$LIMIT" =~ ^[0-9]+$ ]] && (( LIMIT >= 20 )) || { echo "usage: run.sh LIMIT_SECONDS (20 or more) [tiny]"; exit 2; }
TINY=${2:-}
[[ -z "$TINY" || "$TINY" == tiny ]] || { echo "second argument: tiny or nothing"; exit 2; }
[[ -f src/tamba/ops/directions.py ]] || { echo "run from the root of the branch's tree"; exit 2; }
[[ -n "${OUT:-}" && -d "$OUT" ]] || { echo "OUT is no folder"; exit 2; }
[[ -z "${GGUF:-}" || -f "$GGUF" ]] || { echo "GGUF=$GGUF is no file"; exit 2; }
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Asked for by name: without it an opt-in leaves plain torch to be measured.
export TAMBA_KERNELS=triton
export PYTHONPATH=src:benchmarks:tests${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
PY=$(command -v python3 || command -v python)
if [[ -z "$TINY" ]]; then
  "$PY" -c 'import torch, triton, transformers as t; assert torch.cuda.is_available(), "no GPU"; print(torch.__version__, triton.__version__, t.__version__, torch.cuda.get_device_name())' || exit 3
fi
timeout -k 5 "$LIMIT" "$PY" "$HERE/angles.py" "$LIMIT" $TINY
rc=$?
echo "rc $rc"
exit $rc
