"""Provide example models in plain torch, two jobs that train them, and programs that use what was trained.

`python -m models.pretrain` trains a LLaMA from scratch, `python -m models.finetune` a model of `transformers`. For the
others see models/README.md.
"""
