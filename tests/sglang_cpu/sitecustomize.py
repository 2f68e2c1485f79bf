"""What SGLang's server asks of native packages that do not exist for the CPU. `make .venv-sglang` puts this directory
on the path of its environment, so that every process of a server begins with it. For tests only: on a GPU the stock
server is used.

torchvision, which SGLang imports for models with pictures, is an empty name. The buffer for routers' choices, which it
pins with CUDA, is a plain tensor.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any

ABSENT = "torchvision"
PROBES = "transformers/utils/import_utils.py"  # asks whether packages are there: torchvision is not
PROBE_DEPTH = 8
POOLS = "sglang.srt.mem_cache.pool_host.common"


class Nothing:
    """Whatever is asked of a package that is not there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Nothing:
        return self

    def __getattr__(self, name: str) -> Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()


class AbsentModule(types.ModuleType):
    """A module all of whose names are classes of `Nothing`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (Nothing,), {"__module__": self.__name__})
        setattr(self, name, value)
        return value


class AbsentPackage(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `ABSENT` and everything inside of it, but for those who only ask whether it is there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] != ABSENT or self._only_asked():
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    @staticmethod
    def _only_asked() -> bool:
        frame: Any = sys._getframe(2)
        for _ in range(PROBE_DEPTH):
            if frame is None:
                return False
            if frame.f_code.co_filename.endswith(PROBES):
                return True
            frame = frame.f_back
        return False

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = AbsentModule(spec.name)
        module.__path__ = []
        module.__version__ = "0.0.0"
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module as soon as it is imported."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self._name, self._then = name, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self._name:
            return None
        spec: Any = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            self._then(module)

        spec.loader.exec_module = exec_module
        return spec


def plain_host_memory(pools: Any) -> None:
    """Host buffers without CUDA's pinning."""
    import torch

    def allocate(dims: Any, dtype: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
        return torch.empty(dims, dtype=dtype, device="cpu")

    pools.ALLOC_MEMORY_FUNCS["cpu"] = allocate


sys.meta_path.append(AbsentPackage())
sys.meta_path.insert(0, AfterImport(POOLS, plain_host_memory))
