"""Frozen bases in low precision, deferred folds, and conversion with torchao.

The formats are torchao's. A residual stores the rounding error of the codes, so that the errors of repeated folds do
not add up.
"""

from dynlora_fn.bases._defer import defer as defer
from dynlora_fn.bases._defer import fold_pending as fold_pending
from dynlora_fn.bases._deferred import Deferred as Deferred
from dynlora_fn.bases._float8 import Float8Codes as Float8Codes
from dynlora_fn.bases._int8 import Int8Codes as Int8Codes
from dynlora_fn.bases._mxfp4 import MXFP4Codes as MXFP4Codes
from dynlora_fn.bases._nf4 import NF4Codes as NF4Codes
from dynlora_fn.bases._nvfp4 import NVFP4Codes as NVFP4Codes
from dynlora_fn.bases._quantize import drift as drift
from dynlora_fn.bases._quantize import quantize as quantize
from dynlora_fn.bases._quantized import Quantized as Quantized
from dynlora_fn.bases._sharded import Sharded as Sharded
from dynlora_fn.bases._torchao_tensors import from_torchao as from_torchao
from dynlora_fn.bases._torchao_tensors import to_torchao as to_torchao
