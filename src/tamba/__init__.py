"""Turn a pretrained Transformer language model into a Transformer-Mamba hybrid."""

from transformers import AutoConfig, AutoModelForCausalLM

from tamba.model.config import TambaConfig
from tamba.model.modeling import TambaForCausalLM

AutoConfig.register("tamba", TambaConfig)
AutoModelForCausalLM.register(TambaConfig, TambaForCausalLM)
