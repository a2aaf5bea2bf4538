"""The documentation: links that lead somewhere, a reference that leaves nothing out, a site that builds without a warning."""

from __future__ import annotations

import posixpath
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import docs_pages  # noqa: E402
import docs_reference  # noqa: E402

import kdcache  # noqa: E402
from kdcache.cli.main import COMMANDS  # noqa: E402
from kdcache.config.capture import CaptureConfig  # noqa: E402
from kdcache.config.describe import describe_fields  # noqa: E402
from kdcache.config.train import TrainConfig  # noqa: E402

MARKDOWN = [
    "README.md",
    *sorted(
        path.relative_to(ROOT).as_posix()
        for folder in ("kdcache", ".github", "benchmarks")
        for path in (ROOT / folder).rglob("*.md")
        if "results" not in path.parts
    ),
]


def anchors(text: str) -> set[str]:
    """What a heading of a Markdown file is reached by, as the hosts of repositories and the site make it."""
    headings = re.findall(r"^#{1,6} +(.+?) *$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", MARKDOWN)
def test_every_link_of_a_markdown_file_leads_to_a_file_and_to_a_heading_in_it(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    lost = []
    for target in docs_pages.links(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = ROOT / posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else ROOT / name
        if not file.exists() or (anchor and anchor not in anchors(file.read_text("utf-8"))):
            lost.append(target)
    assert lost == []


def test_the_reference_has_every_public_name_every_command_and_every_key() -> None:
    pytest.importorskip("torch")
    pages = docs_reference.pages()
    api = "\n".join(text for page, text in pages.items() if page.startswith("reference/api-"))
    assert [name for name in kdcache.__all__ if name != "__version__" and f"}} kdcache.{name}" not in api] == []
    assert [command for command in COMMANDS if f"usage: kdcache {command}" not in pages["reference/cli"]] == []
    keys = [field.path for config in (CaptureConfig, TrainConfig) for field in describe_fields(config)]
    assert [key for key in keys if f"| `{key}` |" not in pages["reference/config"]] == []


@pytest.mark.parametrize("name", [name for name in MARKDOWN if name.startswith("kdcache/docs/") or name == "README.md"])
def test_a_key_that_a_page_names_is_a_key_of_a_config(name: str) -> None:
    keys = {field.path for config in (CaptureConfig, TrainConfig) for field in describe_fields(config)}
    sections = {key.rpartition(".")[0] for key in keys} | {key.partition(".")[0] for key in keys if "." in key}
    named = re.findall(r"`([a-z_]+\.[a-z_.]+)(?:: [^`]*)?`", (ROOT / name).read_text("utf-8"))
    wrong = [key for key in named if key.partition(".")[0] in sections and key not in keys | sections]
    assert wrong == []


def test_a_page_that_links_to_nothing_ends_the_build_with_the_link(tmp_path: Path) -> None:
    (tmp_path / "kdcache").mkdir()
    (tmp_path / "README.md").write_text("# a\n[there](kdcache/README.md), [code](kdcache/code.py), [gone](gone.md)\n")
    (tmp_path / "kdcache" / "README.md").write_text("# b\n[back](../README.md#a)\n")
    (tmp_path / "kdcache" / "code.py").write_text("")
    with pytest.raises(docs_pages.LinkError, match=r"^README.md: \[gone\]\(gone.md\): there is no gone.md$"):
        docs_pages.write(tmp_path, tmp_path / "out", {})


def test_the_workflow_and_the_templates_are_yaml_and_test_every_python_that_the_package_names() -> None:
    yaml = pytest.importorskip("yaml")
    files = {path.name: yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / ".github").rglob("*.yml")}
    assert set(files) == {"test.yml", "bug.yml", "idea.yml", "config.yml"}
    assert all(field["type"] == "textarea" for name in ("bug.yml", "idea.yml") for field in files[name]["body"])
    named = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text("utf-8"))
    assert files["test.yml"]["jobs"]["test"]["strategy"]["matrix"]["python"] == named


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `bash tools/docs` does, where every warning is an error."""
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    pytest.importorskip("torch")
    out = tmp_path_factory.mktemp("docs")
    command = [sys.executable, str(ROOT / "tools" / "docs.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return out / "site"


class _Page(HTMLParser):
    """The links of an HTML page, and the names that a link can lead to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names = {""}
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.names |= {given[key] or "" for key in ("id", "name") if key in given}
        self.links += [given[key] or "" for key in ("href", "src") if key in given and tag != "form"]


def lost_links(site: Path) -> Iterator[str]:
    pages = {path: _Page(path) for path in site.rglob("*.html") if path.name != "webpack-macros.html"}
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            is_lost = not target.exists() or (target in pages and unquote(parts.fragment) not in pages[target].names)
            if is_lost:
                yield f"{path.relative_to(site)}: {link}"


@pytest.mark.slow
def test_the_site_builds_and_every_link_within_it_leads_somewhere(site: Path) -> None:
    assert (site / "index.html").exists()
    assert sum(1 for _ in site.rglob("*.html")) > 20
    assert list(lost_links(site)) == []
