"""Offline data selection for image training: an embedding cache, spectral batch selection, a stream of kept indices.

``__init__.pyi`` lists the public names. Each loads what it needs when it is first used, so ``import gstds_cache`` is
quick.
"""

from __future__ import annotations

from importlib.metadata import version

import lazy_loader

__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("gstds-cache")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
