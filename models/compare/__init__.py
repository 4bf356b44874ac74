"""Train several methods with the same settings and print their measurements side by side.

`python -m models.compare --help` lists the options.
"""
