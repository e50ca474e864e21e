"""Settings of the network, the fit and the mesh, and the presets that name useful sets of them.

All lengths are in the unit frame ([-1, 1]^3) unless the name says otherwise.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from sdfserver.errors import ConfigError

Optimizer = Literal["adam", "soap"]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """A SIREN 3 -> hidden x layers -> 1 (Sitzmann et al. 2020)."""

    hidden: int = 256
    """Width of every sine layer."""
    layers: int = 4
    """Number of sine layers."""
    omega: float = 30.0
    """Factor inside every sine."""

    def __post_init__(self) -> None:
        _require(1 <= self.hidden <= 4096, f"hidden is {self.hidden}; it must be 1 to 4096")
        _require(1 <= self.layers <= 32, f"layers is {self.layers}; it must be 1 to 32")
        _require(0 < self.omega < math.inf, f"omega is {self.omega}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the surface is taken out of the field."""

    resolution: int = 256
    """Grid cells along each side of the unit frame's cube [-1, 1]^3."""
    level_world: float = 0.0
    """Signed distance of the surface that is extracted, in world units: positive is an outer offset."""
    trim_distance_world: float | None = None
    """Drop what is farther than this from every input point, in world units; None keeps a closed surface."""
    min_component_share: float = 0.0
    """Drop connected components with less than this share of the largest one's area."""
    target_faces: int | None = None
    """Simplify to about this many faces; None keeps them all."""
    projection_steps: int = 2
    """Clamped Newton steps that move each vertex onto the level set."""

    def __post_init__(self) -> None:
        _require(8 <= self.resolution <= 4096, f"resolution is {self.resolution}; it must be 8 to 4096")
        _require(math.isfinite(self.level_world), f"level is {self.level_world}; it must be finite")
        trim = self.trim_distance_world
        _require(trim is None or 0 < trim < math.inf, f"trim distance is {trim}; it must be positive")
        share = self.min_component_share
        _require(0 <= share <= 1, f"min_component_share is {share}; it must be 0 to 1")
        faces = self.target_faces
        _require(faces is None or faces >= 4, f"target_faces is {faces}; it must be at least 4")
        _require(0 <= self.projection_steps <= 10, f"projection_steps is {self.projection_steps}; it must be 0 to 10")
