"""Guides: short programs to read, run and copy from.

Run one with ``python -m models.guides.NAME``.
"""
