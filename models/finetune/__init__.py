"""Fine-tune a model of `transformers` on text.

`python -m models.finetune --help` lists the options.
"""
