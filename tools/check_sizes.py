"""Prints the sizes of files and functions under kdcache/ and tools/, and fails where one is over its cap.

The caps are for reading: who must raise one argues for it in the same change. Kernels may have longer bodies (a fused loop
does not come apart), and tests are exempt from all. A body is counted without its docstring, comments included.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FILE_CAP, BODY_CAP, KERNEL_BODY_CAP, PARAMETER_CAP = 400, 50, 100, 7
FOLDERS = ("kdcache", "tools")

# The public losses are called with keywords, in the manner of torch.nn.functional; what is rarely asked for is one object.
# torch's custom operators take tensors, numbers and strings, and no objects.
MORE_PARAMETERS = {
    "sparse_kd_loss": 8,
    "fused_sparse_kd_loss": 9,
    "vocab_parallel_sparse_kd_loss": 9,
    "_fused": 8,
    "ranking_loss": 8,
    "_unpack_rows": 8,
}

# numba's copy on disk of what it has compiled notices a change of that file alone: a stream's whole decoder is one file, and
# so is all that the row kernels call by name.
LONGER_FILES = {"kdcache/codec/archive/_numba_decode.py": 480, "kdcache/kernels/_numba_positions.py": 530}


@dataclass(frozen=True)
class Size:
    """One measured thing: a file, or a function's body or parameter list."""

    what: str
    where: str
    value: int
    cap: int


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement after the docstring to the last."""
    body = function.body[1:] if is_docstring(function.body[0]) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef, *, is_method: bool) -> int:
    """Parameters a caller gives: without `self` and `cls`; `*args` and `**kwargs` count one each."""
    args = function.args
    named = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    starred = [arg for arg in (args.vararg, args.kwarg) if arg is not None]
    return len(named) + len(starred) - (is_method and bool(named) and named[0].arg in ("self", "cls"))


def measure(path: Path, root: Path) -> Iterator[Size]:
    """Sizes of one file and of every function in it, nested ones included."""
    source = path.read_text(encoding="utf-8")
    name = path.relative_to(root).as_posix()
    is_kernel = "kernels" in path.parts
    yield Size("file", name, len(source.splitlines()), LONGER_FILES.get(name, FILE_CAP))
    tree = ast.parse(source, filename=str(path))
    methods = {child for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for child in node.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            where = f"{name}:{node.lineno} {node.name}"
            yield Size("body", where, body_lines(node), KERNEL_BODY_CAP if is_kernel else BODY_CAP)
            # A kernel takes its arrays one by one: there is no object to gather them in.
            if not is_kernel:
                cap = MORE_PARAMETERS.get(node.name, PARAMETER_CAP)
                yield Size("parameters", where, num_parameters(node, is_method=node in methods), cap)


def percentile(values: list[int], share: float) -> int:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def table(sizes: list[Size]) -> str:
    """Count, median, 95th percentile, largest and where it is, one line per kind of size."""
    lines = [f"{'':10} {'count':>5} {'median':>6} {'p95':>4} {'max':>4}  largest"]
    for what in ("file", "body", "parameters"):
        chosen = [size for size in sizes if size.what == what]
        if chosen:
            values = [size.value for size in chosen]
            largest = max(chosen, key=lambda size: size.value)
            row = f"{len(values):5} {percentile(values, 0.5):6} {percentile(values, 0.95):4} {largest.value:4}  {largest.where}"
            lines.append(f"{what:10} {row}")
    return "\n".join(lines)


def main(root: Path) -> int:
    paths = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    sizes = [size for path in paths for size in measure(path, root)]
    print(table(sizes))
    over = [size for size in sizes if size.value > size.cap]
    for size in over:
        print(f"{size.where}: {size.what} is {size.value}, the cap is {size.cap}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
