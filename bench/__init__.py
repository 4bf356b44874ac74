"""Answer one question with each program: ``python -m bench.NAME [--quick] [--json] [--out FILE]``."""
