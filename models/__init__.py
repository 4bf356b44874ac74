"""Provide example models in plain torch, and two jobs: `python -m models.pretrain` and `python -m models.finetune`."""
