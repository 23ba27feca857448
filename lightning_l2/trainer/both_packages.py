"""Make the callbacks at home in `pytorch_lightning` too, which this package never imports itself.

A Trainer and a CLI of `pytorch_lightning` ask for callbacks that derive from its own base class. Which of the two
packages a program imports first must not matter: sorted imports put `lightning_l2` before `pytorch_lightning`.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

OTHER = "pytorch_lightning"


def derive_from_both(callback: type, base: str = "Callback") -> None:
    """Add the base class of the other package to `callback` and all that derive from it, now or once it is imported.

    Args:
        callback: The class that derives from the base class in `lightning`.
        base: The base class's name in `pytorch_lightning.callbacks`.
    """
    if OTHER in sys.modules:
        other = getattr(getattr(sys.modules[OTHER], "callbacks", None), base, None)
        # a program may have one package stand for the other, or put something else in its place
        if isinstance(other, type) and other not in callback.__mro__:
            callback.__bases__ = (*callback.__bases__, other)
    else:
        sys.meta_path.insert(0, _OnImport(callback, base))


class _OnImport(MetaPathFinder):
    """Finds the other package as if this finder weren't there, and acts when an import of it is done.

    It stays until then: a check whether a package is there asks for a spec and imports nothing, and an import may fail.
    """

    def __init__(self, callback: type, base: str) -> None:
        self._callback = callback
        self._base = base
        self._is_asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what the finders after this one find, with a loader that derives the callbacks too."""
        if fullname != OTHER or self._is_asking:
            return None
        self._is_asking = True
        try:
            spec = importlib.util.find_spec(OTHER)
        finally:
            self._is_asking = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_derive(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                derive_from_both(self._callback, self._base)

        spec.loader.exec_module = execute_and_derive  # type: ignore[method-assign]
        return spec
