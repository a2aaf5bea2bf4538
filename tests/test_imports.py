"""What a fresh interpreter loads: looking at help, configs or manifests must not wait for numpy, torch or vLLM."""

import ast
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import kdcache

HEAVY = ("datasets", "matplotlib", "numba", "numpy", "pyarrow", "torch", "tqdm", "transformers", "vllm", "yaml")
GPU = ("datasets", "matplotlib", "numba", "torch", "transformers", "vllm")
PACKAGE = Path(kdcache.__file__).parent
POINTER = re.compile(r"(kdcache(?:\.\w+)+):(\w+)")


def loaded_after(code):
    """Top-level packages that a fresh interpreter has loaded after running the code; SystemExit is let pass."""
    listing = "print('\\nLOADED', *{m.split('.')[0] for m in sys.modules})"
    program = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\n{listing}"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(result.stdout.rpartition("LOADED")[2].split())


def help_of(*command):
    return f"from kdcache.cli.main import main; main({[*command, '--help']!r})"


@pytest.mark.parametrize(
    "code",
    [
        "import kdcache; dir(kdcache)",
        "from kdcache import KdcacheError, Manifest",
        "import kdcache.errors, kdcache.format.manifest, kdcache.format.paths",
        "import kdcache.config.capture, kdcache.config.loader, kdcache.config.train",
        "import kdcache.train.adapters",
        help_of(),
        help_of("capture"),
        help_of("fold"),
        help_of("verify"),
        help_of("doctor"),
        help_of("convert"),
        help_of("derive"),
        help_of("info"),
        help_of("train"),
        help_of("evaluate"),
        "from kdcache.cli.main import main; main(['--version'])",
    ],
)
def test_looking_loads_nothing_heavy(code):
    assert sorted(loaded_after(code) & set(HEAVY)) == []


@pytest.mark.parametrize(
    "code",
    [
        "import kdcache; kdcache.open, kdcache.Cache, kdcache.CacheWriter",
        "import kdcache; kdcache.SequenceRecord, kdcache.Distributions, kdcache.TokenSequence",
        "import kdcache; kdcache.Loader",
        "import kdcache.capture.executors.run, kdcache.capture.estimate",
        "import kdcache.store.verify, kdcache.store.summary",
        "import kdcache.foreign.judge.doctor, kdcache.foreign.convert, kdcache.foreign.judge.deep, kdcache.foreign.judge.own",
        "import kdcache.derive.run",
        "import kdcache.teacher, kdcache.teacher.base, kdcache.teacher.tokenizer",
    ],
)
def test_caches_are_read_and_captures_planned_without_a_gpu_package(code):
    assert sorted(loaded_after(code) & set(GPU)) == []


def pointers():
    """Every "module:name" in a string of the package: tables that are resolved on use."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and (match := POINTER.fullmatch(node.value)):
                found.add((match[1], match[2]))
    return sorted(found)


@pytest.mark.parametrize(("module", "name"), pointers())
def test_every_entry_of_a_table_names_something_that_is_there(module, name):
    """Read off the source, so that entries are checked whose packages are not installed."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    assert name in top_level_names(ast.parse(Path(spec.origin).read_text()))


def top_level_names(tree):
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def imports_of(path):
    """The dotted names of the package's modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_a_module_whose_name_begins_with_an_underscore_is_imported_by_its_own_package_alone():
    """The package is the part after `kdcache`: kdcache.loader may import kdcache.loader.batches._numba_tokens."""
    strangers = [
        (str(path.relative_to(PACKAGE)), name)
        for path in PACKAGE.rglob("*.py")
        for name in imports_of(path)
        if name.startswith("kdcache.")
        and any(part.startswith("_") and not part.startswith("__") for part in name.split(".")[1:])
        and name.split(".")[1] != path.relative_to(PACKAGE).parts[0]
    ]
    assert strangers == []
