"""Teachers on a server, found by its URL.

- `teacher` finds a model on a server, proves that its numbers are what a record needs, and asks it.
- `client` keeps requests in flight and answers in order; `retry` says when a request is sent again and what a refusal means.
- `answers` says what a server is asked and what its answers mean; `proofs` what a few short prompts prove.
- `settings` checks the config's part.
"""

from __future__ import annotations

from kdcache.teacher.backend import Backend


class ServedBackend(Backend):
    """The backend `served`: the server's GPUs are its own."""

    teacher = "kdcache.teacher.served.teacher:ServedTeacher"
    packages, extra = ("httpx2",), "served"
