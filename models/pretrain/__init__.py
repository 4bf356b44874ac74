"""Pre-train a LLaMA on text.

`python -m models.pretrain --help` lists the options.
"""
