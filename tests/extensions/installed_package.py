"""What an installer leaves of a package: enough for its entry points to be found."""

from __future__ import annotations

from pathlib import Path

TOYS = Path(__file__).parent / "toys"
ENTRY_POINTS = """\
[kdcache.codecs]
toy = toy_codec:ToyCodec
broken = toy_that_is_not_there:Codec
[kdcache.divergences]
squared_distance = toy_divergence:SquaredDistance
squared_distance_in_torch = toy_divergence:SquaredDistanceInTorch
[kdcache.losses]
top_token_error = toy_loss:TopTokenError
[kdcache.inputs]
dashes = toy_input:DASHES
no_format = toy_input:read
[kdcache.teachers]
toy = toy_teacher:ToyBackend
"""


def install(folder: Path, entry_points: str = ENTRY_POINTS, name: str = "toys") -> Path:
    """Write what an installer leaves of a package in a folder: its name and its entry points."""
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(entry_points)
    return folder
