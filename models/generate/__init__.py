"""Continue a text with a trained model.

`python -m models.generate --help` lists the options.
"""
