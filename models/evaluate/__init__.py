"""Measure the loss of a trained model on a text.

`python -m models.evaluate --help` lists the options.
"""
