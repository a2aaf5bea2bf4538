"""GPU readings, with a stand-in for NVIDIA's library: there may be no GPU here, and the real one is tried where there is."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from capture_cases import make_config

from kdcache.capture.watch import _nvml
from kdcache.capture.watch.meter import GpuReadings, gpus_held, start_meter
from kdcache.capture.watch.progress import BarProgress
from kdcache.capture.watch.progress_file import ProgressFile
from kdcache.config.teacher import TeacherConfig, VllmConfig


class NVMLError(Exception):
    pass


class Library:
    """Two GPUs; the second does not tell its power. Energy rises by 500 J with each question."""

    NVMLError = NVMLError

    def __init__(self):
        self.millijoules = 0

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        if index > 1:
            raise NVMLError("no such GPU")
        return index

    def nvmlDeviceGetHandleByUUID(self, name):
        return {"GPU-b": 1}[name]

    def nvmlDeviceGetName(self, handle):
        return b"H200" if handle else "H100"

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=3 + handle, total=80)

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=97)

    def nvmlDeviceGetPowerUsage(self, handle):
        if handle:
            raise NVMLError("not supported")
        return 350_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self.millijoules += 500_000
        return self.millijoules


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setattr(_nvml, "pynvml", Library())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    _nvml._handles.cache_clear()
    yield monkeypatch
    _nvml._handles.cache_clear()


def test_what_a_gpu_does_not_say_is_left_out(library):
    assert _nvml.gpu_states() == [
        _nvml.GpuState(0, "H100", 3, 80, 97, 350.0),
        _nvml.GpuState(1, "H200", 4, 80, 97, None),
    ]


@pytest.mark.parametrize(("visible", "names"), [("1", ["H200"]), ("GPU-b,0", ["H200", "H100"]), ("", []), ("7", [])])
def test_only_the_gpus_that_the_process_may_use_are_read(library, visible, names):
    library.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.name for gpu in _nvml.gpu_states()] == names


def test_a_unit_is_charged_for_the_gpus_that_its_teacher_holds(library):
    teacher = TeacherConfig(model="m", backend="vllm", vllm=VllmConfig(tensor_parallel_size=2))
    assert gpus_held(teacher) == 2
    account = start_meter(2)(())
    assert account.gpu_seconds == pytest.approx(2 * account.wall_seconds, abs=0.002)
    assert account.energy_joules == 2000.0, "the second two questions, less the first two, of 500 J each"
    assert gpus_held(TeacherConfig(model="m", backend="fake")) == 0
    pipeline = {"backend": "vllm", "engine_options": {"pipeline_parallel_size": 2}}
    assert gpus_held(TeacherConfig(model="m", **pipeline)) == 2
    assert gpus_held(TeacherConfig(model="m", vllm=VllmConfig(tensor_parallel_size=2), **pipeline)) == 2, (
        "no more than there are"
    )
    assert gpus_held(TeacherConfig(model="m", backend="transformers")) == 1
    spread = TeacherConfig(model="m", backend="transformers", engine_options={"device_map": "auto"})
    assert gpus_held(spread) == 2, "all that the process may use"


def test_gpus_are_read_when_the_teacher_answers_and_not_when_a_failure_takes_answers_back(library):
    readings = GpuReadings()
    readings.advance(-5)
    assert readings.last == ()
    readings.advance(5)
    assert readings.last == tuple(_nvml.gpu_states())


def test_on_a_cluster_each_worker_shows_its_own_gpus_and_the_driver_none(library, tmp_path):
    config = make_config(tmp_path, run={"executor": "ray"})
    state = ProgressFile(tmp_path / "progress.json", config)
    gpu, _ = _nvml.gpu_states()
    state.worker("worker-0", 7, 3, [gpu])
    found = json.loads((tmp_path / "progress.json").read_text())
    assert found["gpus"] == []
    assert found["workers"] == {"worker-0": {"pid": 7, "unit": 3, "gpus": [asdict(gpu)]}}
    bar = BarProgress()
    assert bar._gpu_texts() == ["GPU 0 3.00B 97%", "GPU 1 4.00B 97%"]
    bar.worker("worker-0", 7, 3, [gpu])
    assert bar._gpu_texts() == []


def test_without_the_library_or_a_driver_there_are_no_gpus(library):
    class NoDriver(Library):
        def nvmlInit(self):
            raise NVMLError("driver not loaded")

    for absent in (None, NoDriver()):
        library.setattr(_nvml, "pynvml", absent)
        _nvml._handles.cache_clear()
        assert _nvml.gpu_states() == []
        assert _nvml.energy_joules(1) is None
        assert start_meter(gpus_held(TeacherConfig(model="m", backend="vllm")))(()).gpu_seconds is None


@pytest.mark.gpu
def test_a_real_gpu_is_read(library):
    library.setattr(_nvml, "pynvml", pytest.importorskip("pynvml"))
    _nvml._handles.cache_clear()
    if not (gpus := _nvml.gpu_states()):
        pytest.skip("NVIDIA's library is installed, but no driver and GPU")
    (gpu, *_) = gpus
    assert gpu.memory_total_bytes > gpu.memory_used_bytes > 0
    assert _nvml.energy_joules(1) > 0
