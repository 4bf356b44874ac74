"""Write a fine-tuned model for `transformers`, and its adapter for PEFT.

Both folders contain the tokenizer.
"""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn

import dynlora_fn as dl
from models.corpus import Corpus
from models.finetune.config import Config
from models.finetune.load import load_model
from models.finetune.model_folder import digest, stored_dtypes
from models.finetune.parameters import convert, drop_values
from models.pretrain.device import run_device
from models.pretrain.run import validation_loss


class Export(NamedTuple):
    """A function that writes the files at the end of a run."""

    config: Config
    model: nn.Module
    digest: str  # of the given model
    tokenizer: Any
    corpus: Corpus
    folder: Path
    console: Console

    def __call__(self, params: dict[str, Any]) -> None:
        """Write the merged model, the adapter, or both."""
        if self.config.output.export != "adapter":
            self._write_model(params)
        if self.config.output.export != "merged" and self.config.training.method != "full":
            self._write_adapter(params)

    def _write_model(self, params: dict[str, Any]) -> None:
        given = stored_dtypes(Path(self.config.training.model))
        dtype = given.copy().pop() if len(given) == 1 else torch.float32
        model = copy.deepcopy(self.model)  # on the meta device
        convert(model, dtype)
        dl.interop.save_merged(model, params, self.folder / "model")
        self.tokenizer.save_pretrained(self.folder / "model")
        if len(given) > 1:
            names = ", ".join(sorted(str(one).removeprefix("torch.") for one in given))
            self._say(f"model/ is in float32, since the given model has several dtypes: {names}")

    def _write_adapter(self, params: dict[str, Any]) -> None:
        name, folder = self.config.training.model, self.folder / "adapter"
        if digest(Path(name)) != self.digest:
            self._say(f"adapter/ is not written, because the model in {name} has changed since the start of the run")
            return
        original, rank = load_model(name), self.config.output.adapter_rank
        try:
            dl.interop.save_adapter(self.model, params, folder, original=original.state_dict(), rank=rank)
        except ValueError as error:
            self._say(f"adapter/ is not written: {error}")
            return
        path = folder / "adapter_config.json"
        options = json.loads(path.read_bytes())
        options |= {"base_model_name_or_path": str(Path(name).resolve()), "task_type": "CAUSAL_LM"}
        path.write_text(json.dumps(options, indent=1) + "\n")
        self.tokenizer.save_pretrained(folder)
        adapted = dl.interop.load_adapter(original.to(run_device(self.config)), folder, seed=0)
        drop_values(original)
        self._say_loss(options["r"], adapted, params)

    def _say_loss(self, rank: int, adapted: dict[str, Any], params: dict[str, Any]) -> None:
        """Print the validation losses of the adapter and of the trained weights."""
        loss, trained = (validation_loss(self.config, self.model, tree, self.corpus) for tree in (adapted, params))
        text = (
            f"adapter/ of rank {rank} has a validation loss of {loss:.4f}, and the trained weights have {trained:.4f}"
        )
        self._say(text + ("; a larger --adapter-rank is more accurate" if loss > trained + 1e-3 else ""))

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)
