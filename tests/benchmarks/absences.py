"""Packages that others import and a benchmark does not use: once this is imported, empty ones where there are none."""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Absent(ModuleType):
    """A package that is imported and not used: whatever is taken from it is a class."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Absences(MetaPathFinder, Loader):
    """Finds packages that are not installed, and makes them."""

    NAMES = (
        "torchvision",
        "kornia",
        "timm",
        "segmentation_models_pytorch",
        "lightly",
        "wandb",
        "soilgrids",
        "transformers",
    )

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return that this finder makes it; asked last, so only for what no other finds."""
        return ModuleSpec(fullname, self) if fullname.partition(".")[0] in self.NAMES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return a package of classes."""
        return _Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: it is all there."""


sys.meta_path.append(_Absences())
