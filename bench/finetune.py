"""Does fine-tuning with LoRA gain as much as PEFT at the same learning rate?

It also checks that PEFT and `transformers` open the results. Two models learn from the sources of Python's standard
library. A sentence encoder learns which docstring in a batch belongs to which function. A causal model that was trained
on Python learns the docstrings.

This library and PEFT have the same alpha, learning rate, targets and batches. Each draws its initial factors itself.
"""

import ast
import copy
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NamedTuple

import peft
import torch
import transformers
import tyro
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

import dynlora_fn as dl
from bench.support.harness import Options, finish, start, table
from models.corpus import Document, standard_library
from models.recipes import lora

Loss = Callable[[Callable[..., Any], Any], Tensor]
SIZES = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
TEMPERATURE = 0.05


@dataclass(frozen=True)
class Finetune(Options):
    encoder: Path | None = None
    """Folder of a pre-trained encoder such as MiniLM. Default None uses a small BERT with random weights."""
    models: tuple[Literal["encoder", "causal"], ...] = ("encoder", "causal")
    steps: int = 200
    seeds: int = 3
    rank: int = 16
    alpha: float = 16.0
    lr: float = 2e-4
    encoder_batch: int = 4
    encoder_tokens: int = 12
    causal_batch: int = 8
    causal_tokens: int = 64
    pretrain_steps: int = 300
    """Number of steps that train the causal model on Python sources, before it is fine-tuned."""
    eval_batches: int = 32


class Task(NamedTuple):
    """A model with its loss and its batches."""

    name: str
    model: nn.Module
    loss: Loss
    batch: Callable[[int, int], Any]  # a function of seed and step; seed -1 is for validation
    kind: Any  # the class that opens the merged model

    def targets(self) -> list[str]:
        """Return the names of the weights of all linear layers except the head."""
        linear = {name for name, layer in self.model.named_modules() if isinstance(layer, nn.Linear)}
        return [f"{name}.weight" for name in sorted(linear - {"lm_head", "pooler.dense"})]


def encoder_task(config: Finetune, documents: Sequence[Document]) -> Task:
    """Build the task to find the docstring of each function in the batch (InfoNCE)."""
    pairs = [(name.replace("_", " "), text) for name, text in functions(documents)]
    if config.encoder is None:
        torch.manual_seed(0)
        model: nn.Module = transformers.BertModel(transformers.BertConfig(vocab_size=256, **SIZES))
        tokenized = bytes_of
    else:
        model = transformers.AutoModel.from_pretrained(config.encoder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.encoder)
        tokenized = lambda text, length: tokenizer(text, truncation=True, max_length=length)["input_ids"]  # noqa: E731

    def batch(seed: int, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        items = pairs[::10] if seed < 0 else [pair for at, pair in enumerate(pairs) if at % 10]
        chosen = drawn(items, config.encoder_batch, seed, step)
        left, right = ([tokenized(pair[side], config.encoder_tokens) for pair in chosen] for side in (0, 1))
        return padded(left, config), padded(right, config)

    def loss(run: Callable[..., Any], pair: tuple[dict[str, Tensor], dict[str, Tensor]]) -> Tensor:
        left, right = (embedded(run, side) for side in pair)
        return cross_entropy(left @ right.T / TEMPERATURE, torch.arange(len(left), device=left.device))

    return Task("encoder", model.to(config.device).eval(), loss, batch, transformers.AutoModel)


def embedded(run: Callable[..., Any], tokens: dict[str, Tensor]) -> Tensor:
    """Return the normalized mean of the last hidden states.

    This is the embedding of sentence-transformers.
    """
    mask = tokens["attention_mask"][..., None]
    hidden = run(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    return normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def causal_task(config: Finetune, documents: Sequence[Document]) -> Task:
    """Build the task to predict docstrings, for a LLaMA trained on whole files."""
    torch.manual_seed(0)
    options = transformers.LlamaConfig(vocab_size=256, use_cache=False, **SIZES)
    model = transformers.LlamaForCausalLM(options).to(config.device)
    sources = torch.tensor(list("\n".join(document.text for document in documents).encode()))
    texts = torch.tensor(list("\n".join(text for _, text in functions(documents)).encode()))
    cut = len(texts) * 9 // 10

    def windows(tokens: Tensor, seed: int, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
        starts = torch.randint(len(tokens) - config.causal_tokens - 1, (config.causal_batch,), generator=generator)
        return tokens[starts[:, None] + torch.arange(config.causal_tokens + 1)].to(config.device)

    def loss(run: Callable[..., Any], tokens: Tensor) -> Tensor:
        return cross_entropy(run(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())

    def batch(seed: int, step: int) -> Tensor:
        return windows(texts[cut:] if seed < 0 else texts[:cut], seed, step)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(config.pretrain_steps):
        descend(optimizer, loss(model, windows(sources, 0, step)))
    return Task("causal", model.eval(), loss, batch, transformers.AutoModelForCausalLM)


def functions(documents: Sequence[Document]) -> list[tuple[str, str]]:
    """Return the name and the docstring of every function that has one."""
    nodes = (node for document in documents for node in ast.walk(ast.parse(document.text)))
    named = ((node.name, ast.get_docstring(node)) for node in nodes if isinstance(node, ast.FunctionDef))
    return [(name, text) for name, text in named if text]


def drawn(items: Sequence[Any], count: int, seed: int, step: int) -> list[Any]:
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
    return [items[at] for at in torch.randint(len(items), (count,), generator=generator).tolist()]


def bytes_of(text: str, length: int) -> list[int]:
    return list(text.encode()[:length])


def padded(rows: Sequence[list[int]], config: Finetune) -> dict[str, Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=config.device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=config.device)
    return {"input_ids": ids, "attention_mask": mask}


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def validation_loss(config: Finetune, task: Task, run: Callable[..., Any]) -> float:
    return mean(task.loss(run, task.batch(-1, at)).item() for at in range(config.eval_batches))


def batches(config: Finetune, task: Task, seed: int) -> Iterator[Any]:
    return (task.batch(seed, step) for step in range(config.steps))


def with_peft(config: Finetune, task: Task, seed: int) -> float:
    """Return the validation loss after training with PEFT."""
    torch.manual_seed(seed)
    pattern = "|".join(re.escape(name.removesuffix(".weight")) for name in task.targets())
    options = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=pattern)
    model = peft.get_peft_model(copy.deepcopy(task.model), options).eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=0.0)
    for batch in batches(config, task, seed):
        descend(optimizer, task.loss(model, batch))
    return validation_loss(config, task, model)


def with_dynlora(config: Finetune, task: Task, seed: int) -> tuple[float, dict[str, Any]]:
    """Return the validation loss after training with this library, and the parameters."""
    options = {"rank": config.rank, "alpha": config.alpha, "lr": config.lr, "seed": seed}
    params = lora(task.model, task.loss, batches(config, task, seed), targets=task.targets(), **options)
    return validation_loss(config, task, lambda *args, **kwargs: dl.call(task.model, params, *args, **kwargs)), params


def errors_of_files(config: Finetune, task: Task, params: dict[str, Any]) -> dict[str, float]:
    """Return the errors of the losses of the written adapter and the merged model.

    The correct loss is the validation loss of the parameters.
    """
    loss = validation_loss(config, task, lambda *args, **kwargs: dl.call(task.model, params, *args, **kwargs))
    with tempfile.TemporaryDirectory() as folder:
        dl.interop.save_adapter(task.model, params, f"{folder}/adapter", original=task.model.state_dict())
        dl.interop.save_merged(task.model, params, f"{folder}/model")
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(task.model), f"{folder}/adapter").eval()
        merged = task.kind.from_pretrained(f"{folder}/model").to(config.device).eval()
        opened = {"adapter": adapted, "merged": merged}
        return {name: abs(validation_loss(config, task, model) - loss) for name, model in opened.items()}


def main(config: Finetune) -> None:
    if config.quick:
        small = {"encoder": None, "steps": 4, "seeds": 1, "pretrain_steps": 4, "eval_batches": 2}
        config = Finetune(**{**vars(config), **small})
    console = start(config)
    documents = [document for document in standard_library() if "/" not in document.name]
    raw: dict[str, Any] = {}
    rows: list[list[Any]] = []
    makers = {"encoder": encoder_task, "causal": causal_task}
    for task in (makers[name](config, documents) for name in config.models):
        before = validation_loss(config, task, task.model)
        for seed in range(config.seeds):
            theirs, (ours, params) = with_peft(config, task, seed), with_dynlora(config, task, seed)
            errors = errors_of_files(config, task, params)
            raw[f"{task.name} {seed}"] = {"before": before, "peft": theirs, "dynlora": ours, **errors}
            gain = (before - ours) / (before - theirs)
            rows.append([f"{task.name}, seed {seed}", before, theirs, ours, ours / theirs, gain, *errors.values()])
    columns = ["model", "before", "PEFT", "ours", "ours / PEFT", "gain / PEFT's", "adapter off by", "merged off by"]
    console.print(table(f"validation loss after {config.steps} steps at {config.lr}", columns, rows))
    results = {
        "largest_loss_over_peft": max(row[4] for row in rows),
        "least_loss_over_peft": min(row[4] for row in rows),
        "mean_gain_over_peft": mean(row[5] for row in rows),
        "largest_error_of_files": max(max(row[6:]) for row in rows),
    }
    console.print(results)
    finish(config, results, raw)


if __name__ == "__main__":
    main(tyro.cli(Finetune))
