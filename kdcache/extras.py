"""Which extra of kdcache brings which package: the one place where an import that finds nothing becomes a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from kdcache.errors import MissingDependencyError

EXTRAS = {
    "accelerate": "accelerate",
    "datasets": "datasets",
    "fsspec": "remote",
    "gcsfs": "gs",
    "httpx2": "served",
    "huggingface_hub": "hf",
    "jinja2": "transformers",
    "lightning": "lightning",
    "matplotlib": "report",
    "ray": "ray",
    "s3fs": "s3",
    "safetensors": "transformers",
    "tokenizers": "transformers",
    "torch": "transformers",
    "transformers": "transformers",
    "trl": "trl",
    "vllm": "vllm",
}
"""Name in an import statement -> the extra that brings it."""

STORES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "memory": "fsspec"}
"""Scheme of an object store's address -> the package that speaks it, beside fsspec."""


def require(*packages: str, purpose: str, extra: str | None = None) -> None:
    """Say so before any work where a package is not installed; imports none.

    Args:
        packages: names as in an import statement, of EXTRAS.
        purpose: what needs them: the beginning of a sentence.
        extra: that brings all of them and what else the purpose needs; None for the package's own.

    Raises:
        MissingDependencyError: the first that is missing, with the line that installs it.
    """
    for package in packages:
        if find_spec(package) is None:
            raise MissingDependencyError(package, extra=extra or EXTRAS[package], purpose=purpose)


@contextmanager
def needed_for(purpose: str, extra: str | None = None) -> Iterator[None]:
    """Turn an import within, that fails for want of a package of EXTRAS, into a sentence; see `require`.

    Raises:
        MissingDependencyError: names the package, the purpose and the line that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS or find_spec(package) is not None:
            raise
        raise MissingDependencyError(package, extra=extra or EXTRAS[package], purpose=purpose) from error
