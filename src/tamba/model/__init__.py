"""The model: one class for every mix of layers, its configuration and its state.

Importing anything of it makes transformers' Auto classes know the model.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tamba.model.config import TambaConfig
from tamba.model.modeling import TambaForCausalLM, TambaModel

AutoConfig.register(TambaConfig.model_type, TambaConfig)
AutoModel.register(TambaConfig, TambaModel)
AutoModelForCausalLM.register(TambaConfig, TambaForCausalLM)
