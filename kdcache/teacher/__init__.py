"""Models that answer with their next-token distributions, and the tokenizers that feed them. See README.md and base.py.

Backends are named in a table and imported on use: this module loads nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdcache import extensions
from kdcache.errors import ConfigError
from kdcache.shown import get_logger, shown

if TYPE_CHECKING:
    from kdcache.config.teacher import TeacherConfig
    from kdcache.teacher.backend import Backend
    from kdcache.teacher.base import Teacher
    from kdcache.teacher.tokenizer import Tokenizer

log = get_logger(__name__)

BACKENDS = extensions.OWN["teachers"]
"""Name in a config -> `module:Class` of a `Backend`, for those that kdcache brings."""


def find_backend(name: str) -> Backend:
    """Find the backend of this name, ours or another package's.

    Raises:
        ConfigError: there is none.
    """
    if not extensions.is_known("teachers", name):
        raise ConfigError(
            f"teacher.backend is {shown(repr(name), 100)}; expected one of {', '.join(extensions.names('teachers'))}"
        )
    return extensions.find("teachers", name)(name)


def load_teacher(config: TeacherConfig) -> Teacher:
    """Load the model that a config names. Close it when done.

    Raises:
        ConfigError: a setting that the backend does not have.
        MissingDependencyError: the backend's package is not installed.
        TeacherError: the model does not load.
    """
    if config.trusts_remote_code:
        log.warning(
            "teacher.engine_options.trust_remote_code is on: Python code next to %r runs with your rights", config.model
        )
    return find_backend(config.backend).load(config)


def load_tokenizer(
    name: str, revision: str | None = None, chat_template: str | None = None, *, trust_remote_code: bool = False
) -> Tokenizer:
    """Load a tokenizer.

    Args:
        name: hub id or local folder; "fake" for bytes, which needs no package.
        revision: hub commit or tag.
        chat_template: text of a Jinja template to use in place of the tokenizer's own.
        trust_remote_code: run the Python code that comes with the tokenizer, with the rights of this process.

    Raises:
        ConfigError: a chat template for the fake tokenizer.
        MissingDependencyError: transformers is not installed.
        TeacherError: the tokenizer does not load.
    """
    from kdcache.teacher.backend import import_class

    purpose = f"the tokenizer {name!r}"
    if name == "fake":
        return import_class("kdcache.teacher.fake:FakeTokenizer", (), purpose=purpose, extra=None)(chat_template)
    path, packages = "kdcache.teacher.chat.hf_tokenizer:HfTokenizer", ("torch", "transformers")
    tokenizer = import_class(path, packages, purpose=purpose, extra="transformers")
    return tokenizer(name, revision, chat_template, trust_remote_code=trust_remote_code)
