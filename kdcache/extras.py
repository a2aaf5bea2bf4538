"""Which extra of kdcache installs which package, and the message for a missing one."""

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
"""Name in an import statement -> the extra that installs it."""

STORES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "memory": "fsspec"}
"""Scheme of an object store's address -> the package that it needs in addition to fsspec."""


def require(*packages: str, purpose: str, extra: str | None = None) -> None:
    """Check that packages are installed, before any work starts; imports none of them.

    Args:
        packages: names as in an import statement, from EXTRAS.
        purpose: what needs them, as the beginning of a sentence.
        extra: the one that installs everything for the purpose; None for the package's own.

    Raises:
        MissingDependencyError: names the first missing package and the command that installs it.
    """
    for package in packages:
        if find_spec(package) is None:
            raise MissingDependencyError(package, extra=extra or EXTRAS[package], purpose=purpose)


def is_installed(*packages: str) -> bool:
    """Whether all of them are; imports none."""
    return all(find_spec(package) is not None for package in packages)


@contextmanager
def needed_for(purpose: str, extra: str | None = None) -> Iterator[None]:
    """Turn a failed import of a package in EXTRAS into one sentence; see `require`.

    Raises:
        MissingDependencyError: names the package, the purpose and the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS or find_spec(package) is not None:
            raise
        raise MissingDependencyError(package, extra=extra or EXTRAS[package], purpose=purpose) from error
