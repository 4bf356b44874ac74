"""Example models in plain torch, and programs that train and use them.

`python -m models.pretrain` trains a LLaMA from scratch, `python -m models.finetune` a model of `transformers`. For the
others see models/README.md.
"""
