# rows.sh SECONDS: conversations in one process, findings in two more
export PYTHONPATH=src:/tmp/site PYTHONUNBUFFERED=1
D=.carry/text; S=$1
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/chat-site .carry/chatwhl/*.whl
PYTHONPATH=$PYTHONPATH:/tmp/chat-site python3 -c "
import datasets, trl
from trl import SFTTrainer, DPOTrainer
import tamba.train.chat_steps
print(datasets.__version__, trl.__version__)" || exit 4
ls $D > /dev/null || exit 3
xz -dkc $D/preferences.jsonl.xz > /tmp/preferences.jsonl
T="--train $D/train.jsonl.xz --heldout $D/valid.jsonl --out /tmp/runs"
date +%T
PYTHONPATH=$PYTHONPATH:/tmp/chat-site timeout $S python3 experiments/mamba_in_llama.py short sft dpo sft-dpo $T \
  --prompts $D/prompts.jsonl --preferences /tmp/preferences.jsonl --questions $D/mt_bench.jsonl \
  --set train.1.micro_batch=16 --set train.2.micro_batch=16 --record $OUT/chat.json > $OUT/chat.log 2>&1 &
A=$!
for i in $(seq 150); do ls /tmp/runs/shared/least_squares*.seconds >/dev/null 2>&1 && break; kill -0 $A 2>/dev/null || break; sleep 1; done
date +%T
L=$((S - SECONDS - 70))
small() { # SEEDS LOG ROWS
  timeout $((S - SECONDS)) python3 experiments/mamba_in_llama.py $3 --seeds $1 $T \
  --set train.1.tokens=400000 --set train.1.batch=16 --set train.2.tokens=1200000 --set train.2.batch=16 \
  --set train.1.micro_batch=8 --set train.2.micro_batch=8 --seconds $L --record $OUT/$2.json > $OUT/$2.log 2>&1
}
small "1 0 2" one "no-align teacher-tuned one-by-one all-but-mlp block" &

wait
date +%T
for f in chat one; do echo "== $f"; grep -E "seed|rror|OutOf" $OUT/$f.log | tail -12; done
tail -c 1500 $OUT/chat.log
ls /tmp/runs/shared | grep seconds; tail -n +1 /tmp/runs/shared/*.seconds | tr '\n' ' '
