"""The clouds that come with the package: small, oriented, made by the project itself (data/make.py)."""

from pathlib import Path

from sdfserver.errors import CloudError

SUMMARIES = {
    "bare": "a bath duck without normals: estimate them",
    "bracket": "an angle bracket in millimetres, with sharp edges",
    "goblet": "a stemmed glass with a thin wall",
    "knot": "a trefoil knot: the one to begin with",
    "lattice": "27 nodes joined by 54 struts",
    "noisy": "a bath duck with noise",
    "sparse": "a bath duck of 500 points",
    "terrain": "a hillside at map coordinates: open, so trim it",
}
"""What each of them is, and what is hard about it."""
_INSTALLED = Path(__file__).parent / "samples"
_CHECKOUT = Path(__file__).parent.parent / "data"


def samples() -> dict[str, Path]:
    """The bundled clouds' files by name."""
    folder = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
    return {path.stem: path for path in sorted(folder.glob("*.ply"))}


def sample(name: str) -> Path:
    """The file of the bundled cloud called `name`. Raises CloudError."""
    found = samples()
    if name not in found:
        raise CloudError(f"there is no bundled cloud {name!r}; there are {', '.join(found) or 'none'}")
    return found[name]
