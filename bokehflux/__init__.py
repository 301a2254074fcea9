"""bokehflux: lens-true control of defocus in FLUX text-to-image models, in pure PyTorch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from bokehflux.version import __version__

__all__ = ["Pipeline", "Result", "__version__", "load"]

# In a checkout `kernels/` and `weights/` lie beside this folder; a wheel has them inside. See setup.py.
if not os.path.isfile(os.path.join(os.path.dirname(__file__), "kernels", "__init__.py")):
    __path__.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

if TYPE_CHECKING:
    from bokehflux.pipeline.generate import Pipeline, Result, load


def __getattr__(name: str) -> Any:
    # `import bokehflux` stays instant: torch is imported when a public name is first used.
    if name in __all__:
        from bokehflux.pipeline import generate

        return getattr(generate, name)
    raise AttributeError(f"module 'bokehflux' has no attribute {name!r}")
