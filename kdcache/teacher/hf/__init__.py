"""Teachers run by transformers.

- `teacher` holds the contract: groups, batches, identity.
- `forward` runs a model in pieces: its body, its output projection and the selection a chunk of positions at a time.
- `load` loads a model; `attention` checks that its attention does what its config asks.
- `rotary` gives each text of a batch the rotary factors that it has alone; `proof` finds out which texts may share a forward.
- `activations` sums up what layers, heads, neurons and channels do, for students cut from the teacher; `axes` finds them.
- `features` takes hidden states by hooks; `generate` writes answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdcache.teacher.backend import Backend

if TYPE_CHECKING:
    from kdcache.config.teacher import TeacherConfig


class HfBackend(Backend):
    """The backend `transformers`."""

    teacher = "kdcache.teacher.hf.teacher:HfTeacher"
    packages, extra = ("torch", "transformers"), "transformers"

    def num_gpus(self, config: TeacherConfig) -> int:  # noqa: ARG002
        """See `Backend`."""
        return 1

    def spreads(self, config: TeacherConfig) -> bool:
        """See `Backend`: with a `device_map` it takes what it is given."""
        return "device_map" in config.engine_options
