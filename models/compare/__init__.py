"""Train several methods with the same settings, and print their measurements.

`python -m models.compare --help` lists the options.
"""
