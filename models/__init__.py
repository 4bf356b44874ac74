"""Provide example models in plain torch, and two jobs that train them.

`python -m models.pretrain` trains a LLaMA from scratch, `python -m models.finetune` a model of `transformers`.
"""
