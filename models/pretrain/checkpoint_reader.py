"""Read the tensors of a checkpoint into memory that exists already."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed import checkpoint
from torch.futures import Future


class Reader(checkpoint.HuggingFaceStorageReader):
    """Read rows of tensors from their file directly into the tensors of a state.

    torch's reader maps the file, which counts as another state in memory. Only columns are read by way of a copy of
    their tensor.
    """

    def read_data(self, plan: Any, planner: Any) -> Future[None]:
        """Read what a plan asks for, one file after another. `torch.distributed.checkpoint` calls this."""
        requests = defaultdict(list)
        for request in plan.items:
            requests[self.storage_data[request.storage_index].relative_path].append(request)
        for path, of_file in requests.items():
            self._read_file(Path(path), of_file, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_file(self, path: Path, requests: list[Any], planner: Any) -> None:
        with safe_open(path, framework="pt", backend="pread") as checked, path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            for request in requests:
                stored, target = header[request.storage_index.fqn], planner.resolve_tensor(request).detach()
                if not _is_rows(request, stored["shape"], target):
                    self._process_read_request(checked, request, planner)
                    continue
                first_row = request.storage_offsets[0] if target.ndim else 0
                row_bytes = target.nbytes // max(target.shape[0], 1) if target.ndim else 0
                file.seek(8 + size + stored["data_offsets"][0] + first_row * row_bytes)
                content = target.reshape(-1).view(torch.uint8).numpy()
                if file.readinto(content) != len(content):
                    raise ValueError(f"{path} ends inside {request.storage_index.fqn}; it was cut while it was read")
                planner.commit_tensor(request, target)


def _is_rows(request: Any, shape: list[int], target: Tensor) -> bool:
    """Return whether some rows of a stored tensor are wanted in contiguous memory of the CPU."""
    lengths = list(request.lengths)
    is_rows = lengths[1:] == shape[1:] and list(target.shape) == lengths
    return is_rows and target.is_contiguous() and target.device.type == "cpu"
