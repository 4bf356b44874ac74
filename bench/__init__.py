"""Answer one question with each program: ``python -m bench.NAME``.

Options are ``[--quick] [--json] [--out FILE]``.
"""
