"""Counts the files that one piece of data passes through: `python tools/walk.py gradient | divergence`.

A file of the package counts when one of its functions ran; a move is a crossing of a file border, by a call or by a return.
What runs while a module is imported does not count. Two walks are built in, over a tiny cache that a fake teacher makes:

- `gradient`: from a cache on disk to the gradient of a loss: open, first batch, loss, backward.
- `divergence`: from `loss.divergence` in a YAML file to its kernel: `kdcache train` until the first loss. Here a function
  counts only if it holds the divergence (an argument that is it, or that has it as a field), if it lies in `kdcache/loss` or
  `kdcache/kernels`, or if it is the caller of one that counts.

The files are printed in the order in which they are first met.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
DIVERGENCE = "reverse_kl"
VOCAB_SIZE = 320
_IS_FUNCTION = 1  # inspect.CO_OPTIMIZED: neither a module's body nor a class's


@dataclass
class Walk:
    """What ran: `files` in the order in which they were first met, how many functions, and how many moves."""

    files: list[str] = field(default_factory=list)
    functions: set[tuple[str, int]] = field(default_factory=set)
    num_moves: int = 0

    def table(self) -> str:
        """The files, one a line, and the counts."""
        counts = f"{len(self.files)} files, {len(self.functions)} functions, {self.num_moves} moves"
        return "\n".join([*self.files, counts])


class Tracer:
    """Follows the calls of all threads.

    Args:
        package: the folder whose files count.
        counts: whether a function counts, by its frame as it is entered; None for all. Its callers count with it.
    """

    def __init__(self, package: Path, counts: Callable[[FrameType], bool] | None = None) -> None:
        self._prefix, self._counts = f"{package}/", counts
        self.walk, self._lock, self._local = Walk(), threading.Lock(), threading.local()

    @contextmanager
    def following(self) -> Iterator[None]:
        """Count what runs inside the block, in threads that it starts too."""
        threading.setprofile(self._see)
        sys.setprofile(self._see)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # pyright: ignore[reportArgumentType]

    def _see(self, frame: FrameType, event: str, _: Any) -> None:
        if event not in ("call", "return") or not frame.f_code.co_filename.startswith(self._prefix):
            return
        stack: list[_Call] = self._local.__dict__.setdefault("stack", [])
        if event == "call":
            name = frame.f_code.co_filename.removeprefix(self._prefix)
            is_import = not frame.f_code.co_flags & _IS_FUNCTION or bool(stack and stack[-1].is_import)
            stack.append(_Call(frame, name, is_import))
            if not is_import and (self._counts is None or self._counts(frame)):
                for call in stack:
                    self._enter(call)
        elif stack and stack[-1].frame is frame:
            left = stack.pop()
            if stack and left.is_counted:
                self.walk.num_moves += left.file != stack[-1].file

    def _enter(self, call: _Call) -> None:
        if call.is_counted:
            return
        call.is_counted = True
        with self._lock:
            stack = self._local.stack
            before = stack[stack.index(call) - 1] if call is not stack[0] else call
            self.walk.num_moves += before.file != call.file
            self.walk.functions.add((call.file, call.frame.f_code.co_firstlineno))
            if call.file not in self.walk.files:
                self.walk.files.append(call.file)


@dataclass(eq=False)
class _Call:
    """A call that has not returned yet."""

    frame: FrameType
    file: str
    is_import: bool
    is_counted: bool = False


def gradient(folder: Path) -> Walk:
    """Open a cache, take the first batch, and go back through a loss of it."""
    import torch

    import kdcache

    cache, options = make_cache(folder), kdcache.LoaderConfig(seq_len=64, batch_rows=2)
    kdcache.open, kdcache.Loader, kdcache.TorchLoader, kdcache.sparse_kd_loss  # noqa: B018 - imported before the walk begins
    tracer = Tracer(Path(kdcache.__file__).parent)
    with tracer.following():
        loader = kdcache.TorchLoader(kdcache.Loader(kdcache.open(cache), options))
        batch = next(iter(loader))
        logits_PV = torch.zeros(batch.teacher.num_positions, VOCAB_SIZE, requires_grad=True)
        kdcache.sparse_kd_loss(logits_PV, batch.teacher).backward()
    loader.close()
    return tracer.walk


def divergence(folder: Path) -> Walk:
    """Train one step with a divergence that is not the default."""
    import torch

    import kdcache
    from kdcache.cli.main import main

    config = folder / "train.yaml"
    config.write_text(TRAINING.format(folder=folder, cache=make_cache(folder), divergence=DIVERGENCE))
    (folder / "config.json").write_text(json.dumps(STUDENT))

    def counts(frame: FrameType) -> bool:
        module = frame.f_globals["__name__"]
        return module.startswith(("kdcache.loss", "kdcache.kernels")) or _holds_divergence(frame)

    def stop(*_: Any, **__: Any) -> None:
        raise _FirstLossError

    tracer = Tracer(Path(kdcache.__file__).parent, counts)
    with suppress(_FirstLossError), patch.object(torch.Tensor, "backward", stop), tracer.following():
        main(["train", str(config)])
    return tracer.walk


class _FirstLossError(Exception):
    """Ends the training once there is a loss."""


def _holds_divergence(frame: FrameType) -> bool:
    """Whether an argument of the function is the divergence or has it as a field."""
    code = frame.f_code
    values = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]]
    return any(_is_divergence(value) or _is_divergence(getattr(value, "divergence", None)) for value in values)


def _is_divergence(value: Any) -> bool:
    return (value if isinstance(value, str) else getattr(value, "name", None)) == DIVERGENCE


def make_cache(folder: Path) -> Path:
    """A complete cache of some lines of text, by the fake teacher."""
    from kdcache.capture.executors.run import run_capture
    from kdcache.config.capture import CaptureConfig
    from kdcache.config.load import convert_config

    (folder / "text").write_text("".join(f"line {i}: a text of a few words\n" for i in range(8)))
    fields = {
        "input": {"format": "lines", "paths": [str(folder / "text")], "window": {"size": 64}},
        "teacher": {"model": "fake", "backend": "fake", "fake": {"vocab_size": VOCAB_SIZE}},
        "selection": {"kind": "top_k", "k": 8},
        "codec": {"id": "packed"},
        "out": str(folder / "cache"),
    }
    run_capture(convert_config(fields, CaptureConfig))
    return folder / "cache"


STUDENT = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
TRAINING = """\
cache: {cache}
out: {folder}/out
student: {{model: {folder}, tokenizer: fake}}
loader: {{seq_len: 64, batch_rows: 2}}
loss: {{divergence: {divergence}}}
steps: 1
"""
WALKS = {walk.__name__: walk for walk in (gradient, divergence)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("walk", choices=sorted(WALKS))
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        walk = WALKS[args.walk](Path(folder))
    print(walk.table())
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
