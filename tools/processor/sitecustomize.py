"""Under KDCACHE_CPU=avx2 torch says that this processor has no AVX-512: vLLM asks it. See `restrict` beside this."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

HIDDEN = ("avx512", "amx", "avx10")


class TorchCpu:
    """Finds `torch.cpu` as ever, and changes what it answers once it is loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != "torch.cpu":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), hide(module))[0]  # type: ignore[method-assign]
        return spec


def hide(torch_cpu: Any) -> None:
    for name in vars(torch_cpu):
        if name.startswith("_is_") and any(word in name for word in HIDDEN):
            setattr(torch_cpu, name, lambda: False)
    if hasattr(torch_cpu, "get_capabilities"):
        get_capabilities = torch_cpu.get_capabilities
        torch_cpu.get_capabilities = lambda: {
            name: value and not name.startswith(HIDDEN) for name, value in get_capabilities().items()
        }


def load_hidden(path: list[str]) -> ModuleType | None:
    """Python imports one `sitecustomize` alone: the one that this one hides is run too."""
    folder = os.path.dirname(os.path.abspath(__file__))
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", [p for p in path if os.path.abspath(p) != folder])
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


load_hidden(sys.path)
if os.environ.get("KDCACHE_CPU") == "avx2":
    sys.meta_path.insert(0, TorchCpu())
