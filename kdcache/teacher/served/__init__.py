"""Teachers behind a URL."""

from __future__ import annotations

from kdcache.teacher.backend import Backend


class ServedBackend(Backend):
    """The backend `served`: the server's GPUs are its own."""

    teacher = "kdcache.teacher.served.teacher:ServedTeacher"
    packages, extra = ("httpx2",), "served"
