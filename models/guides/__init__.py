"""Guides: short programs to read, run and copy from.

``python -m models.guides.NAME`` runs one.
"""
