"""What `verify --deep` says of the difference between the cache's teacher and the one that it asks."""

from kdcache.cli.teacher_arguments import setting_differences
from kdcache.config.load import config_to_builtins
from kdcache.config.teacher import FakeConfig, TeacherConfig

ASKED = TeacherConfig(model="m", backend="fake", fake=FakeConfig(vocab_size=300))


def test_settings_are_compared_by_path_and_equal_ones_are_not_named():
    assert setting_differences(ASKED, config_to_builtins(ASKED)) == []
    captured = config_to_builtins(TeacherConfig(model="m", backend="fake", fake=FakeConfig(vocab_size=400)))
    (line,) = setting_differences(ASKED, captured)
    assert line == "note: according to the cache, its teacher had fake.vocab_size 400; asked with 300"


def test_a_cache_from_before_settings_were_renamed_is_compared_by_their_new_names():
    captured = {"model": "m", "backend": "fake", "vocab_size": 300, "seed": 1, "batch_tokens": 8192, "route": "auto"}
    (line,) = setting_differences(ASKED, captured)
    assert line == "note: according to the cache, its teacher had fake.seed 1; asked with 0"
