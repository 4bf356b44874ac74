"""Training on several processes: average gradients, shard, compare, count bytes.

Switching needs no communication: every process derives the same plan and vectors from the seed and the step. Only a
switch of sharded factors all-gathers the rows that it folds.
"""

from dynlora_fn._core._types import ShardedFactors as ShardedFactors
from dynlora_fn._core._types import Sharding as Sharding
from dynlora_fn.parallel._check_replicas import DriftedError as DriftedError
from dynlora_fn.parallel._check_replicas import check_replicas as check_replicas
from dynlora_fn.parallel._dtensors import as_dtensors as as_dtensors
from dynlora_fn.parallel._gloo import register_gloo as register_gloo
from dynlora_fn.parallel._reduce import all_reduce_mean as all_reduce_mean
from dynlora_fn.parallel._shard import shard as shard
from dynlora_fn.parallel._shard import shard_factors as shard_factors
from dynlora_fn.parallel._shard import unshard as unshard
from dynlora_fn.parallel._wire_bytes import WireBytes as WireBytes
from dynlora_fn.parallel._wire_bytes import wire_bytes as wire_bytes
