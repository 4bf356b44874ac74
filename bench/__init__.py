"""One script for each question: ``python -m bench.NAME [--quick] [--json] [--out FILE]``."""
