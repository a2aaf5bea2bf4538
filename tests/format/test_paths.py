from __future__ import annotations

import pytest

from kdcache.format import paths

SHA256 = "0123456789abcdef" * 4


def test_the_names_that_are_made_are_the_names_that_are_read():
    for number in (0, 17, 999_999, 1_000_000, 2**31):
        assert paths.parse_manifest_name(paths.manifest_name(number).split("/")[1]) == number
        assert paths.parse_journal_name(paths.journal_name(number, SHA256).split("/")[1]) == number
        assert paths.is_shard_name(paths.shard_name(number, SHA256))
    assert paths.is_index_name(paths.index_name(SHA256))
    for name in (paths.shard_name(1, SHA256), paths.journal_name(1, SHA256), paths.index_name(SHA256)):
        assert paths.is_own_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "data/",
        "../data/000001-0123456789abcdef.arrow",
        "/data/000001-0123456789abcdef.arrow",
        "data/../000001-0123456789abcdef.arrow",
        "data/00001-0123456789abcdef.arrow",
        "data/000001-0123456789abcde.arrow",
        "data/000001-0123456789ABCDEF.arrow",
        "data/000001-0123456789abcdef.arrow\n",
        "data/000001-0123456789abcdef.arrow\0",
        "data\\000001-0123456789abcdef.arrow",
        "data/\u0660\u0660\u0660\u0660\u0660\u0661-0123456789abcdef.arrow",
        "journal/../data/x.json",
        "data/photo.jpg",
        "index/000001.arrow",
    ],
)
def test_other_names_are_nobodys(name):
    assert not paths.is_shard_name(name)
    assert not paths.is_index_name(name)
    assert not paths.is_own_name(name)


@pytest.mark.parametrize("name", ["1.json", "000001.json~", "000001.json\n", "-00001.json", "manifest.json", "00000a.json"])
def test_other_files_beside_manifests_are_passed_over(name):
    assert paths.parse_manifest_name(name) is None
