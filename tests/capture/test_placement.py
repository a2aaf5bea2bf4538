"""What a replica asks of a cluster, and what is said where it does not get it; without a cluster."""

import pytest
from capture_cases import make_config

from kdcache.capture.executors.placement import Needs, not_placed, replica_needs
from kdcache.config.teacher import TeacherConfig, VllmConfig
from kdcache.errors import ConfigError
from kdcache.teacher import find_backend

CLUSTER = {"CPU": 16.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 1),
        ({"vllm": VllmConfig(tensor_parallel_size=4)}, 4),
        ({"vllm": VllmConfig(tensor_parallel_size=2), "engine_options": {"pipeline_parallel_size": 3}}, 6),
        ({"vllm": VllmConfig(tensor_parallel_size=2), "engine_options": {"tensor_parallel_size": 4}}, 4),
        (
            {
                "vllm": VllmConfig(tensor_parallel_size=2),
                "engine_options": {"data_parallel_size": 2, "prefill_context_parallel_size": 2},
            },
            8,
        ),
        ({"engine_options": {"pipeline_parallel_size": None, "data_parallel_size": "two"}}, 1),
        ({"backend": "auto", "engine_options": {"pipeline_parallel_size": 2}}, 2),
        ({"backend": "transformers"}, 1),
        ({"backend": "fake"}, 0),
    ],
)
def test_an_engine_computes_on_the_product_of_its_parallel_sizes(settings, expected):
    config = TeacherConfig(**{"model": "m", "backend": "vllm"} | settings)
    assert find_backend(config.backend).num_gpus(config) == expected


def test_a_replica_asks_for_its_engines_gpus_where_there_are_any_and_for_what_the_config_says_everywhere(tmp_path):
    vllm = {"backend": "vllm", "fake": {}, "vllm": {"tensor_parallel_size": 2}, "engine_options": {"pipeline_parallel_size": 2}}
    config = make_config(tmp_path, teacher=vllm)
    assert replica_needs(config, CLUSTER) == Needs(num_cpus=1, num_gpus=4)
    assert replica_needs(config, {"CPU": 16.0}) == Needs(num_cpus=1, num_gpus=0)
    told = make_config(tmp_path, teacher=vllm, run={"executor": "ray", "gpus_per_replica": 3})
    assert replica_needs(told, {"CPU": 16.0}) == replica_needs(told, CLUSTER) == Needs(num_cpus=1, num_gpus=3)
    none = make_config(tmp_path, teacher=vllm, run={"executor": "ray", "gpus_per_replica": 0})
    assert replica_needs(none, CLUSTER).num_gpus == 0


def test_gpus_per_replica_is_for_ray_alone(tmp_path):
    with pytest.raises(ConfigError, match="gpus_per_replica and ray_address are for executor 'ray' only"):
        make_config(tmp_path, run={"gpus_per_replica": 1})


def test_who_waits_for_a_place_is_told_what_was_asked_for_what_there_is_and_what_to_do():
    sentence = not_placed(2, Needs(num_cpus=1, num_gpus=4), CLUSTER, {"CPU": 15.0})
    assert sentence.startswith(
        "2 replicas have not been placed by the Ray cluster for 30 seconds: each asks for 1 CPU and 4 GPUs on one machine, and "
        "the cluster has 16 CPUs and 8 GPUs, of which 15 CPUs and 0 GPUs are free; waiting. Add machines"
    )
    assert "run fewer replicas, or set run.gpus_per_replica" in sentence
    assert "gpus_per_replica" not in not_placed(1, Needs(1, 0), {"CPU": 1.0}, {})
