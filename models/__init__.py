"""Example models in plain torch, and the main job, `python -m models.pretrain`."""
