"""Models that answer with their next-token distributions, and the tokenizers that feed them. See README.md and base.py.

Backends are named in tables and imported on use: this module loads nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kdcache.errors import TeacherError
from kdcache.extras import require
from kdcache.shown import get_logger

if TYPE_CHECKING:
    from kdcache.config.capture import TeacherConfig
    from kdcache.teacher.base import Teacher
    from kdcache.teacher.tokenizer import Tokenizer

log = get_logger(__name__)

_TEACHERS = {
    "fake": "kdcache.teacher.fake:FakeTeacher",
    "transformers": "kdcache.teacher.hf.teacher:HfTeacher",
    "vllm": "kdcache.teacher.vllm.teacher:VllmTeacher",
    "served": "kdcache.teacher.served.teacher:ServedTeacher",
}
_TOKENIZERS = {
    "fake": "kdcache.teacher.fake:FakeTokenizer",
    "transformers": "kdcache.teacher.chat.hf_tokenizer:HfTokenizer",
}
_PACKAGES = {"fake": (), "transformers": ("torch", "transformers"), "vllm": ("vllm",), "served": ("httpx2",)}
"""What each backend needs; the extra that brings it has the backend's name."""


def load_teacher(config: TeacherConfig) -> Teacher:
    """Load the model that a config names. Close it when done.

    Raises:
        ConfigError: a setting that the backend does not have.
        MissingDependencyError: the backend's package is not installed.
        TeacherError: the model does not load.
    """
    backend = _choose_backend(strict=config.strict) if config.backend == "auto" else config.backend
    if config.trusts_remote_code:
        log.warning(
            "teacher.engine_options.trust_remote_code is on: Python code that lies beside %r runs with your rights",
            config.model,
        )
    return _backend_class(_TEACHERS, backend, f"teacher.backend {backend!r}")(config)


def load_tokenizer(
    name: str, revision: str | None = None, chat_template: str | None = None, *, trust_remote_code: bool = False
) -> Tokenizer:
    """Load a tokenizer.

    Args:
        name: hub id or local folder; "fake" for bytes, which needs no package.
        revision: hub commit or tag.
        chat_template: text of a Jinja template to use in place of the tokenizer's own.
        trust_remote_code: run Python code that lies beside the tokenizer, with the rights of this process.

    Raises:
        ConfigError: a chat template for the fake tokenizer.
        MissingDependencyError: transformers is not installed.
        TeacherError: the tokenizer does not load.
    """
    if name == "fake":
        return _backend_class(_TOKENIZERS, "fake", "")(chat_template)
    tokenizer = _backend_class(_TOKENIZERS, "transformers", f"the tokenizer {name!r}")
    return tokenizer(name, revision, chat_template, trust_remote_code=trust_remote_code)


def _choose_backend(*, strict: bool) -> str:
    """vLLM where it is installed and imports, else transformers; says which on the log. `strict` refuses a broken vLLM."""
    if find_spec("vllm") is None:
        log.info("teacher.backend auto: vllm is not installed, using transformers")
        return "transformers"
    try:
        _backend_class(_TEACHERS, "vllm", "teacher.backend 'auto'")
    except TeacherError as error:
        if strict:
            raise
        log.warning("teacher.backend auto: using transformers, as %s", error)
        return "transformers"
    log.info("teacher.backend auto: using vllm")
    return "vllm"


def _backend_class(table: dict[str, str], backend: str, purpose: str) -> Any:
    require(*_PACKAGES[backend], purpose=purpose, extra=backend)
    module, _, name = table[backend].partition(":")
    try:
        return getattr(import_module(module), name)
    # A build for other hardware or another torch fails in many ways: ImportError, OSError, RuntimeError.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TeacherError(f"{purpose}: {backend} is installed but does not import: {reason}") from error
