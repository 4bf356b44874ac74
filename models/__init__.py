"""Example models in plain torch, and programs that train and use them.

`python -m models.pretrain` trains a LLaMA from scratch, and `python -m models.finetune` fine-tunes a model of
`transformers`. models/README.md lists all programs.
"""
