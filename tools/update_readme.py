"""Put the demo's table into README.md, between its two markers: `python tools/update_readme.py` after `bash tools/demo`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- demo table: tools/update_readme.py -->\n", "<!-- end of demo table -->\n"


def with_table(readme: str, table: str) -> str:
    """The README's text with another table between the markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md lacks the markers {BEGIN.strip()} and {END.strip()}")
    return f"{before}{begin}\n{table.strip()}\n\n{end}{after}"


def main() -> int:
    """Rewrite README.md from the newest demo; exit status 2 where there is none."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "demo-output"
    table = folder / "evaluation" / "evaluation.md"
    if not table.exists():
        print(f"{table}: no such file; run `bash tools/demo` first", file=sys.stderr)
        return 2
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(), table.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
