"""Build the documentation site: the READMEs, the tutorials, and a reference made from docstrings, configs and `--help`.

    python tools/docs.py                 the site is in build/docs/site
    python tools/docs.py --pages-only    the Markdown pages alone, which need no generator, in build/docs/pages

A link that leads nowhere, a page that no table of contents names, or a docstring that is no Markdown ends the build with exit
status 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import docs_pages
import docs_reference

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs", metavar="FOLDER", help="where pages and site go")
    parser.add_argument("--pages-only", action="store_true", help="write the Markdown pages and stop")
    args = parser.parse_args()
    pages, site = args.out / "pages", args.out / "site"
    write_pages(pages)
    if args.pages_only:
        print(pages)
        return 0
    if find_spec("sphinx") is None:
        print("docs: Sphinx is not installed; python -m pip install 'kdcache[docs]'", file=sys.stderr)
        return 2
    status = build(pages, site)
    if status == 0:
        print(site / "index.html")
    return status


def write_pages(folder: Path) -> None:
    """All pages of the site as Markdown, in a folder that is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    docs_pages.write(ROOT, folder, docs_reference.pages())


def build(pages: Path, site: Path) -> int:
    """Sphinx's exit status. Only pages that changed since the last build are made again."""
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going"]
    command += ["-c", str(ROOT / "tools" / "site"), "-d", str(site.parent / "doctrees"), str(pages), str(site)]
    return subprocess.run(command, env={**os.environ, "KDCACHE_DOCS_ROOT": str(ROOT)}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
