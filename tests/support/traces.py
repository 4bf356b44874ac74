"""The recorded traces of the authors' implementation."""

from tests.support.paths import TRACES

FILES = sorted(TRACES.glob("*.npz"))
