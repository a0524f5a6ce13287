"""Where a checkout differs from an installation: the code of looped.kernels stands beside looped/, in kernels/.

looped/kernels is a link to that directory, which a type checker and an editor follow too. Where git makes no links
(Windows, by default), looped's search path takes the link's place.

A checkout's kernels/ is also found by its own name, which Hugging Face's package has too, and transformers imports that
one. There both are served: `kernels` is Hugging Face's package, where one is installed, with the public names of
looped.kernels added; else it is looped.kernels by a second name. No file of ours is loaded twice, for an operation can
be registered only once.
"""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

PACKAGE = Path(__file__).parent


def search_path() -> list[str]:
    """The directories of looped's modules: its own, and where that has no kernels/ the one that has."""
    return [str(PACKAGE)] if (PACKAGE / "kernels").is_dir() else [str(PACKAGE), str(PACKAGE.parent)]


def share_name() -> None:
    """Complete sys.modules["kernels"], which is being imported from a checkout."""
    ours = importlib.import_module("looped.kernels")
    spec = hugging_face()
    if spec is None:
        shared = sys.modules["kernels"]
        shared.__path__ = []  # what is not loaded below can be loaded as looped.kernels' alone
        sys.modules |= {
            name.removeprefix("looped."): module
            for name, module in sys.modules.items()
            if name.startswith("looped.kernels.")
        }
        names = ["__all__", *(name for name in vars(ours) if not name.startswith("__"))]
    else:
        assert spec.loader is not None
        shared = sys.modules["kernels"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(shared)
        names = [name for name in ours.__all__ if not hasattr(shared, name)]
    vars(shared).update({name: getattr(ours, name) for name in names})


def hugging_face() -> ModuleSpec | None:
    """Hugging Face's package: the first `kernels` on the path that is not a checkout's, this one's or another's."""
    spec = PathFinder.find_spec("kernels", [entry for entry in sys.path if not _holds_checkout(Path(entry))])
    return spec if spec is not None and spec.origin is not None else None  # a directory without __init__.py has none


def _holds_checkout(directory: Path) -> bool:
    """Whether what is found there as `kernels` would come here to complete itself."""
    file = directory / "kernels" / "__init__.py"
    return file.exists() and share_name.__name__.encode() in file.read_bytes()
