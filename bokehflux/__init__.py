"""bokehflux: lens-true control of defocus in FLUX text-to-image models, in pure PyTorch."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from bokehflux.version import __version__

HOMES = {
    "load": "bokehflux.pipeline.load",
    "Pipeline": "bokehflux.pipeline.pipeline",
    "Result": "bokehflux.pipeline.run",
}
__all__ = ["Pipeline", "Result", "__version__", "load"]

# In a checkout `kernels/` and `weights/` lie beside this folder; a wheel has them inside. See setup.py.
if not os.path.isfile(os.path.join(os.path.dirname(__file__), "kernels", "__init__.py")):
    __path__.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

if TYPE_CHECKING:
    from bokehflux.pipeline.load import load
    from bokehflux.pipeline.pipeline import Pipeline
    from bokehflux.pipeline.run import Result


def __getattr__(name: str) -> Any:
    # `import bokehflux` stays instant: torch is imported when a public name is first used.
    if name in HOMES:
        return getattr(importlib.import_module(HOMES[name]), name)
    raise AttributeError(f"module 'bokehflux' has no attribute {name!r}")
