"""Come from PEFT: the same adapters and steps, and further methods.

| PEFT | here |
|---|---|
| `LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"])` | `init(rank=8, alpha=16, targets=["*q_proj.weight"])` |
| `get_peft_model(model, config)` | `call(model, params, ...)`; the model is not modified |
| `PeftModel.from_pretrained(model, folder)` | `interop.load_adapter(model, folder, seed=0)` |
| `peft_model.save_pretrained(folder)` | `interop.save_adapter(model, params, folder)` |
| `merge_and_unload()` | `state_dict(model, params)` or `interop.save_merged` |
| `modules_to_save` | every parameter that `partition(frozen=)` does not freeze |

Stay with PEFT for DoRA, for prompt tuning, and for adapters that are swapped while a model serves requests.
"""

import tempfile

import peft
import torch
import transformers

import dynlora_fn as dl

torch.manual_seed(0)
sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
folder, tokens = tempfile.mkdtemp(), torch.arange(16).reshape(2, 8)

# An adapter that PEFT has written. Its factors are random here, as if they were trained.
config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
adapted = peft.get_peft_model(model, config)
adapted.save_pretrained(f"{folder}/adapter")
logits = adapted(tokens).logits
model = adapted.unload()  # PEFT replaces layers of the model; this puts them back

# Load it. The logits equal PEFT's, and so does a step of AdamW at the same rate.
params = dl.interop.load_adapter(model, f"{folder}/adapter", seed=0, check=(tokens,))
torch.testing.assert_close(dl.call(model, params, tokens).logits, logits)

# LoRA trains only the factors. Without `frozen`, embedding, norms and head would be trained too.
full_rank = [name for name, param in params.items() if isinstance(param, torch.Tensor)]
trainable, frozen = dl.partition(params, frozen=full_rank)
optimizer = dl.optim.adamw(factor_decay=0.01)  # decays the factors, as `torch.optim.AdamW(weight_decay=0.01)` with PEFT
opt_state = optimizer.init(trainable)


def loss_fn(trainable):
    """Return the loss of the adapted model."""
    return dl.call(model, dl.combine(trainable, frozen), input_ids=tokens, labels=tokens).loss


grads = dl.value_and_grad(loss_fn)(trainable).grads
updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=1e-3)
params = dl.combine(dl.apply_updates(trainable, updates), frozen)

# Write it back. PEFT opens it, with the same factors and alpha.
dl.interop.save_adapter(model, params, f"{folder}/trained")
opened = peft.PeftModel.from_pretrained(model, f"{folder}/trained")
torch.testing.assert_close(opened(tokens).logits, dl.call(opened.unload(), params, tokens).logits)
