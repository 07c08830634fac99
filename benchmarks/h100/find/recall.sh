# recall.sh TOKENS
export PYTHONPATH=src:/tmp/site PYTHONUNBUFFERED=1
D=.carry/text
ls $D >/dev/null || exit 3
date +%T
timeout 590 python3 experiments/mamba_in_llama.py recall-25 --train $D/train.jsonl.xz --heldout $D/valid.jsonl --out /tmp/runs \
  --set train.1.tokens=3000000 --set data.lookup_share=0.4 --set train.2.tokens=$1 --record $OUT/rows.json \
  --lambada $D/lambada.jsonl --phonebook 60 20 --set "analyze.choose=\"sum least_squares + 1.0 least_squares_recall\"" > $OUT/log.txt 2>&1
rc=$?
date +%T
tail -c 2500 $OUT/log.txt
for f in /tmp/runs/shared/*/train.json; do echo $f; python3 -c "
import json,sys
for s in json.load(open('$f'))['stages']: print(s['stage'], s.get('seconds'), s.get('step_seconds'), s.get('tokens'))" ; done
cat /tmp/runs/shared/*.seconds
exit $rc
