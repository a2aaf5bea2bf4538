"""A Python that sees kdcache's core, and what some extras bring, of all that is installed here: `python hidden_packages.py`.

    python hidden_packages.py 'datasets,report' CODE

What belongs to which extra is read off pyproject.toml and the metadata of what is installed. Everything else cannot be found,
as in an environment in which it is not installed.
"""

import importlib.machinery
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
OWN = {"kdcache", "tests"}


def wanted(extras):
    """The requirements of the core and of some extras."""
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def closure(requirements):
    """Canonical names of all distributions that they bring."""
    found, open_ones = set(), [(r, "") for r in requirements]
    seen = set()
    while open_ones:
        requirement, context = open_ones.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": context}):
            continue
        name = canonicalize_name(requirement.name)
        if name == "kdcache":
            open_ones += [(r, "") for r in wanted(requirement.extras)]
            continue
        found.add(name)
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                open_ones += [(r, extra) for r in requirements_of(name)]
    return found


def requirements_of(name):
    try:
        return [Requirement(line) for line in metadata.requires(name) or ()]
    except metadata.PackageNotFoundError:
        return []


def hide_all_but(extras):
    """From now on imports find the standard library, kdcache, and what core and extras bring."""
    kept = closure(wanted(extras))
    hidden = {
        package
        for package, owners in metadata.packages_distributions().items()
        if package not in OWN and not any(canonicalize_name(owner) in kept for owner in owners)
    }

    class Finder(importlib.machinery.PathFinder):
        @classmethod
        def find_distributions(cls, context=metadata.DistributionFinder.Context()):  # noqa: B008
            found = super().find_distributions(context)
            return (one for one in found if canonicalize_name(one.metadata["Name"]) in {*kept, "kdcache"})

        @classmethod
        def find_spec(cls, fullname, path=None, target=None):
            return None if fullname.partition(".")[0] in hidden else super().find_spec(fullname, path, target)

    sys.meta_path[:] = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
    for name in [name for name in sys.modules if name.partition(".")[0] in hidden]:
        del sys.modules[name]
    return hidden


if __name__ == "__main__":
    hide_all_but([extra for extra in sys.argv[1].split(",") if extra])
    exec(compile(sys.argv[2], "<code>", "exec"), {"__name__": "__main__"})
