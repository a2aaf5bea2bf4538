"""Fixtures that every room shares. Imports nothing heavy: some tests look at what a fresh interpreter loads."""

from __future__ import annotations

import atexit
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from fault_proxy import FaultProxy

# Before any test imports a library that reads them: no hub is asked, no forked tokenizer warns, no usage report is sent.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked vllm assume its CPU build, whose engine runs in this process; on a GPU they would find another."""
    marked = [item for item in items if item.get_closest_marker("vllm")]
    if not marked or find_spec("torch") is None:
        return
    import torch

    if torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="assumes vLLM's CPU build, with the engine in this process"))


@pytest.fixture(scope="session", autouse=True)
def freeze() -> Iterator[Callable[[], None]]:
    """gc.freeze, which nobody else can call or undo: vLLM does both for each engine."""
    atexit.register(gc.unfreeze)  # some libraries complain of what is left when the process ends
    gc.collect()
    with pytest.MonkeyPatch.context() as patch:
        freeze = gc.freeze
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield freeze


@pytest.fixture(scope="module", autouse=True)
def _what_was_there_before_a_module_is_not_searched_for_garbage(freeze: Callable[[], None]) -> Iterator[None]:
    """An engine that starts and stops collects nine times, a model that is closed once; each time takes most of a second where
    every library is loaded, and next to nothing where what was loaded is left out."""
    freeze()
    yield
    gc.collect()


@pytest.fixture(scope="session")
def s3_proxy() -> Iterator[FaultProxy]:
    """A proxy in front of an S3-compatible server over HTTP that is of this test run alone; its objects are in memory."""
    pytest.importorskip("s3fs")
    if find_spec("moto") is None:
        pytest.skip("moto is not installed")
    command = [sys.executable, str(Path(__file__).with_name("s3_server.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        proxy = FaultProxy(("127.0.0.1", int(server.stdout.readline())))
        yield proxy
        proxy.close()
        server.communicate()  # closes its standard input, at which it ends


@pytest.fixture
def s3(s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """The proxy, doing no harm yet; `s3.bucket` is a new bucket, and the standard variables that every S3 client reads lead
    there, also in processes that a test starts."""
    for name, value in s3_proxy.environment.items():
        monkeypatch.setenv(name, value)
    s3_proxy.renew()
    return s3_proxy


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama and its tokenizer; see tests/tiny_model.py. Not to be written into."""
    pytest.importorskip("transformers")
    from tiny_model import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("teacher") / "tiny-llama")
