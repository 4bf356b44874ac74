"""Convert models, files and adapters to parameters and back.

`init` turns a module or a dict of tensors into parameters, and `resize` changes their ranks. The other functions
convert parameters to and from state dicts, safetensors files, PEFT adapters and checkpoints.
"""

from dynlora_fn.interop import _torch_load as _torch_load
from dynlora_fn.interop._checkpoint_load import Checkpoint as Checkpoint
from dynlora_fn.interop._checkpoint_load import Refused as Refused
from dynlora_fn.interop._checkpoint_load import load_checkpoint as load_checkpoint
from dynlora_fn.interop._checkpoint_save import save_checkpoint as save_checkpoint
from dynlora_fn.interop._init import init as init
from dynlora_fn.interop._parameters import FrozenTensor as FrozenTensor
from dynlora_fn.interop._peft_load import load_adapter as load_adapter
from dynlora_fn.interop._peft_save import save_adapter as save_adapter
from dynlora_fn.interop._resize import Resized as Resized
from dynlora_fn.interop._resize import resize as resize
from dynlora_fn.interop._safetensors import Weights as Weights
from dynlora_fn.interop._safetensors import open_weights as open_weights
from dynlora_fn.interop._save import save_weights as save_weights
from dynlora_fn.interop._save_merged import save_merged as save_merged
from dynlora_fn.interop._state_dict import state_dict as state_dict
from dynlora_fn.interop._targets import Rank as Rank
from dynlora_fn.interop._targets import Targets as Targets
