"""Which of kdcache's hooks some sources of vLLM satisfy: `python tools/check_vllm.py FOLDER`, a checkout or an unpacked wheel.

It reads and runs nothing of it, so it needs neither a GPU nor the release's torch. What it looks for is what an engine is asked
for when it starts (`kdcache/teacher/vllm/signatures.py`), and the attributes that the proof on eight tokens will read. Status 1
where anything is missing: then captures take the public route, or none.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from kdcache.config.capture import TeacherConfig
from kdcache.teacher.vllm import signatures as ours
from kdcache.teacher.vllm.options import engine_options

CLASSES = {
    "LLM": "entrypoints",
    "LLMEngine": "v1/engine/llm_engine.py",
    "EngineCoreClient": "v1/engine/core_client.py",
    "ModelConfig": "config/model.py",
    "ParallelConfig": "config/parallel.py",
    "SchedulerConfig": "config/scheduler.py",
    "SamplingParams": "sampling_params.py",
    "EngineArgs": "engine/arg_utils.py",
    "GPUModelRunner": "v1/worker/gpu_model_runner.py",
    "CachedRequestState": "v1/worker/gpu_input_batch.py",
    "PromptLogprobsWorker": "v1/worker/gpu",
    "InputBatch": "v1/worker/gpu/input_batch.py",
    "LogitsProcessor": "model_executor/layers/logits_processor.py",
}
"""Where each class lies, under vllm/; of a folder, in whichever file of it."""

OWNERS = {
    "llm_engine.engine_core": "EngineCoreClient",
    "llm_engine.model_config": "ModelConfig",
    "llm_engine.vllm_config.model_config": "ModelConfig",
    "llm_engine.vllm_config.parallel_config": "ParallelConfig",
    "llm_engine.vllm_config.scheduler_config": "SchedulerConfig",
    "llm_engine": "LLMEngine",
    "": "LLM",
}
"""Whose attribute the last name of a path in `*_PARTS` is."""


class Members:
    """The attributes and methods of one class, its bases among the classes that are known included."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.methods: dict[str, inspect.Signature] = {}
        self.names: set[str] = set()
        wanted = [name]
        for class_name in wanted:
            node = next((node for node in _classes(folder) if node.name == class_name), None)
            if node is not None:
                self._add(node)
                wanted += [base.id for base in node.bases if isinstance(base, ast.Name) and base.id not in wanted]

    def _add(self, cls: ast.ClassDef) -> None:
        for node in ast.walk(cls):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node in cls.body:
                self.methods.setdefault(node.name, _signature(node))
                self.names.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node in cls.body:
                self.names.add(node.target.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
                self.names.add(node.attr)


def faults(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Each of our uses, and what it lacks in the tree.

    Args:
        root: the folder `vllm` itself.
    """
    found = {name: Members(name, root / where) for name, where in CLASSES.items()}
    for use, parts in (
        ("every capture: vllm.LLM", ours.PUBLIC_PARTS),
        ("selection in the worker: vllm.LLM", ours.WORKER_PARTS),
        ("adapters: vllm.LLM", ours.ADAPTER_PARTS),
        ("answers: vllm.LLM", ours.WRITING_PARTS),
    ):
        yield use, _faults_of_parts(found, parts)
    options = engine_options(TeacherConfig(model="m"), {}, is_cpu=True, extension="a.B", rank=1)
    yield "every capture: options of the engine", _lacks(found["EngineArgs"], [*options, "long_prefill_token_threshold"])
    yield "public route: SamplingParams", _lacks(found["SamplingParams"], ours.PUBLIC_SAMPLING)
    yield "selection in the worker: SamplingParams", _lacks(found["SamplingParams"], ours.WORKER_SAMPLING)
    yield "V1 runner: hook", _faults_of_hooks(found["GPUModelRunner"], ours.HOOKS_V1)
    yield "V1 runner: attributes", _lacks(found["GPUModelRunner"], ours.RUNNER_V1)
    for runner, (name, wanted) in (("V1", ours.REQUEST_V1), ("V2", ours.BATCH_V2)):
        yield f"{runner} runner: {name}", _lacks(found[name], wanted)
    yield "V2 runner: hooks", _faults_of_hooks(found["PromptLogprobsWorker"], ours.HOOKS_V2)
    yield "several GPUs: trial without the gather", _lacks(found["LogitsProcessor"], ["_gather_logits"])


def _faults_of_parts(found: Mapping[str, Members], parts: Mapping[str, ours.Call | None]) -> list[str]:
    wrong = []
    for path, call in parts.items():
        owner, _, name = path.rpartition(".")
        members = found[OWNERS[owner]]
        if name not in members.names:
            wrong.append(f"{members.name} has no {name}")
        elif call is not None and name in members.methods and not ours.fits(members.methods[name], call):
            wrong.append(f"{members.name}.{name} takes {members.methods[name]}")
    return wrong


def _faults_of_hooks(members: Members, hooks: Mapping[str, tuple[str, ...]]) -> list[str]:
    wrong = _lacks(members, hooks)
    for name, parameters in hooks.items():
        if name in members.methods and tuple(members.methods[name].parameters) != parameters:
            wrong.append(f"{members.name}.{name} takes {members.methods[name]}")
    return wrong


def _lacks(members: Members, wanted: object) -> list[str]:
    lack = ours.lack_of(members.name, members.names, wanted)  # type: ignore[arg-type]
    return [lack] if lack else []


def _classes(where: Path) -> Iterator[ast.ClassDef]:
    for file in [where] if where.is_file() else sorted(where.rglob("*.py")):
        yield from (node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef))


def _signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> inspect.Signature:
    """Without the first parameter, self."""
    kinds, arguments = inspect.Parameter, function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    num_required = len(positional) - len(arguments.defaults)
    parameters = [
        kinds(each.arg, kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if index < num_required else None)
        for index, each in enumerate(positional)
    ][1:]
    if arguments.vararg:
        parameters.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters.append(kinds(each.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None))
    if arguments.kwarg:
        parameters.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters)


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def version_of(root: Path) -> str:
    """What the tree says that it is; `unknown` of a checkout, whose version file is made when it is built."""
    file = root / "_version.py"
    match = re.search(r"^__version__ = .*?['\"]([^'\"]+)['\"]", file.read_text(), re.MULTILINE) if file.is_file() else None
    return match[1] if match else "unknown"


def main(argv: list[str]) -> int:
    """Print a line per use; 1 where something is missing, 2 where the folder holds no vLLM."""
    folders = [folder for argument in argv for folder in (Path(argument), Path(argument) / "vllm") if (folder / "v1").is_dir()]
    if len(argv) != 1 or not folders:
        print("usage: python tools/check_vllm.py FOLDER, which holds vLLM's sources (a checkout or an unpacked wheel)")
        return 2
    print(f"vLLM {version_of(folders[0])}; kdcache was last proven with {'.'.join(map(str, ours.LAST_PROVEN))}")
    results = list(faults(folders[0]))
    for use, wrong in results:
        print(f"{use}: {'; '.join(wrong) or 'ok'}")
    return int(any(wrong for _, wrong in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
