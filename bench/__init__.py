"""Answer one question with each program: ``python -m bench.NAME``.

Most programs have the options ``[--quick] [--json] [--out FILE]``.
"""

from models.program import hide_import_messages

hide_import_messages()
