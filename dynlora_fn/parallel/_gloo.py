"""A gloo backend that does not end the process: one worker thread in place of two."""

from torch import distributed

from dynlora_fn._core._torch import gloo_with_one_thread

ONE_THREAD = "gloo_one_thread"


def register_gloo() -> str:
    """Register gloo with one worker thread, and return the name of the backend.

    Collectives of torch's gloo can end the process, and collectives on this backend do not. torch's gloo has two worker
    threads. Both write the name of the last operation to one string without a lock, so the string can be freed twice: a
    segmentation fault. Loops with two all-gathers in flight show it within seconds. `pg_options` cannot change the
    number of threads of "gloo".

    Call it on every process before a group is started. Calling it again changes nothing.

    Returns:
        The name to pass as `backend` to `init_process_group` and `new_group`. On GPUs pass
        ``f"cpu:{name},cuda:nccl"``.

    Raises:
        RuntimeError: If torch was built without gloo.

    Numerics: Results have the bits of gloo's. Collectives in flight at the same time run one after the other.

    Example:
        >>> import torch.distributed as dist
        >>> import dynlora_fn as dl
        >>> backend = dl.parallel.register_gloo()
        >>> dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        >>> dist.get_backend()
        'gloo_one_thread'
        >>> dist.destroy_process_group()
    """
    if not distributed.is_gloo_available():
        raise RuntimeError("torch was built without gloo; install a build with it, or use another backend")
    distributed.Backend.register_backend(ONE_THREAD, gloo_with_one_thread, devices=["cpu"])
    return ONE_THREAD
