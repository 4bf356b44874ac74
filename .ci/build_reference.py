"""Build the API reference into ``build/reference``. A warning is an error.

Run ``python .ci/build_reference.py`` with the extra `docs` installed.
"""

import inspect
import shutil
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pdoc
import pdoc.render

ROOT = Path(__file__).parent.parent
OUTPUT = ROOT / "build" / "reference"
NAMESPACES = ("bases", "compile", "interop", "nn", "optim", "parallel", "schedules", "switching", "testing")


def export(module: ModuleType) -> None:
    """Set ``__all__`` to the public names that the imports of a face declare.

    pdoc shows no others.
    """
    module.__all__ = [  # type: ignore[attr-defined]
        name for name, value in vars(module).items() if name[0] != "_" and not inspect.ismodule(value)
    ]


def main() -> None:
    """Build the reference of the package and its namespaces."""
    sys.path.insert(0, str(ROOT))
    names = ["dynlora_fn", *(f"dynlora_fn.{name}" for name in NAMESPACES)]
    for name in names:
        export(pdoc.extract.load_module(name))
    pdoc.render.configure(docformat="google", footer_text="dynlora_fn", math=False)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The types of groups are strings, because importing torch.distributed.tensor takes a second.
        warnings.filterwarnings("ignore", ".*(Group . None|DeviceMesh)")
        pdoc.pdoc(*names, "!dynlora_fn._core", output_directory=OUTPUT)
    pages = sorted(page.relative_to(OUTPUT) for page in OUTPUT.rglob("*.html"))
    print(f"{len(pages)} pages in {OUTPUT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
