"""Config keys that were renamed, so that the message about an unknown key can give the new name."""

from __future__ import annotations

RENAMED = {
    "output.path": "out",
    "output": "shards",
    "run.remote": "remote",
    "teacher.batch_tokens": "teacher.tokens_per_forward",
    "teacher.positions_per_chunk": "teacher.chunk_positions",
    "teacher.gpu_memory_utilization": "teacher.vllm.gpu_memory_utilization",
    "teacher.tensor_parallel_size": "teacher.vllm.tensor_parallel_size",
    "teacher.route": "teacher.vllm.route",
    "teacher.vocab_size": "teacher.fake.vocab_size",
    "teacher.context_length": "teacher.fake.context_length",
    "teacher.seed": "teacher.fake.seed",
    "run.skip_poison": "run.skip_failing",
    "accept_incomplete_cache": "accept: [incomplete]",
    "student.accept_tokenizer_mismatch": "accept: [tokenizer]",
    "student.config_from": "student.model",
    "loss.positions_per_chunk": "loss.chunk_positions",
}
"""Old path of a field or section -> its new path. A longer path is looked up before a shorter one."""


def new_name(path: str) -> str | None:
    """The new path for an old one, also for a field in a renamed section; None if nothing was renamed."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        moved = RENAMED.get(".".join(parts[:end]))
        if moved is not None:
            return ".".join([moved, *parts[end:]])
    return None
