"""Pre-trains a small LLaMA on text: the main job. `python -m models.pretrain --help` lists what can be set."""
