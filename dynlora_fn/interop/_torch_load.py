"""Let ``torch.load(weights_only=True)`` read the types of parameters and states.

All of them are NamedTuples, whose construction runs no code of a file. The types of constants are registered where they
are defined, by `register_constant`.
"""

import torch

# Importing one module of a package imports the package, so that all of its types are defined below.
from dynlora_fn.bases import _quantized  # noqa: F401
from dynlora_fn.optim import _freeze  # noqa: F401
from dynlora_fn.parallel import _shards  # noqa: F401
from dynlora_fn.switching import _pool_types  # noqa: F401


def record_types() -> list[type]:
    """Return every NamedTuple of the library that is defined so far."""
    kinds = (kind for kind in tuple.__subclasses__() if hasattr(kind, "_fields"))
    return [kind for kind in kinds if kind.__module__.startswith("dynlora_fn.")]


torch.serialization.add_safe_globals([*record_types()])
