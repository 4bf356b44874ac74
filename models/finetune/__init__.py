"""Fine-tunes a model of `transformers` on text. `python -m models.finetune --help` lists what can be set."""
