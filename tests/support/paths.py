"""Folders that tests read."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRACES = Path(os.environ.get("DYNLORA_TRACES") or ROOT / "tests" / "traces")
