"""Fine-tune a model of Hugging Face with LoRA, and write it for `from_pretrained`.

`python -m models.finetune` does this for a model folder and a text, with validation and checkpoints.
"""

import tempfile

import torch
import transformers

import dynlora_fn as dl

# A small random model. Use `AutoModelForCausalLM.from_pretrained(folder)` for a trained one. It is not modified.
torch.manual_seed(0)
sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
original = model.state_dict()

# The weights of all attention and feed-forward layers become low-rank. `alpha` is PEFT's `lora_alpha`.
# With start="lora", `b` is zero and the weights equal the model's bit for bit.
params = dl.init(model, rank=4, alpha=8, seed=0, targets=["*_proj.weight"], start="lora")

# LoRA trains only factors, so the full-rank tensors are frozen by name.
full_rank = [name for name, param in params.items() if isinstance(param, torch.Tensor)]
trainable, frozen = dl.partition(params, frozen=full_rank)
optimizer = dl.optim.adamw()
opt_state = optimizer.init(trainable)
tokens = torch.arange(32).reshape(2, 16)


def loss_fn(trainable):
    """Return the loss that the model of `transformers` computes."""
    return dl.call(model, dl.combine(trainable, frozen), input_ids=tokens, labels=tokens).loss


value_and_grad, losses = dl.value_and_grad(loss_fn), []
for _ in range(10):
    loss, grads = value_and_grad(trainable)
    updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=1e-2)
    trainable = dl.apply_updates(trainable, updates)
    losses.append(loss.item())
print(f"loss: {losses[0]:.2f}, then {losses[-1]:.2f}")
assert losses[-1] < losses[0]

# 1. Write the merged model. It opens without this library.
params, folder = dl.combine(trainable, frozen), tempfile.mkdtemp()
dl.interop.save_merged(model, params, f"{folder}/model")
opened = transformers.LlamaForCausalLM.from_pretrained(f"{folder}/model")
torch.testing.assert_close(opened(tokens).logits, dl.call(model, params, tokens).logits, rtol=0, atol=1e-5)

# 2. Write an adapter for PEFT. With `original`, it contains the whole change of the weights, whatever method trained
# them. The result is the error of each weight. It is 0 here, up to rounding, because the change has the rank of the
# factors. After switches the change has a higher rank. On a base in low precision it includes the rounding to codes.
errors = dl.interop.save_adapter(model, params, f"{folder}/adapter", original=original, rank=4)
assert max(errors.values()) < 1e-5
