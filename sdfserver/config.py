"""Settings of the network, the fit and the mesh, and the presets that name useful sets of them.

All lengths are in the unit frame ([-1, 1]^3) unless the name says otherwise.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

from sdfserver.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value", "Tensor", float)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """A SIREN 3 -> hidden x layers -> 1 (Sitzmann et al. 2020)."""

    hidden: int = 96
    """Width of every sine layer. Wider is dearer, and at equal seconds no closer to the surface."""
    layers: int = 4
    """Number of sine layers."""
    omega: float = 30.0
    """Factor inside every sine."""

    def __post_init__(self) -> None:
        _require(1 <= self.hidden <= 4096, f"hidden is {self.hidden}; it must be 1 to 4096")
        _require(1 <= self.layers <= 32, f"layers is {self.layers}; it must be 1 to 32")
        _require(0 < self.omega < math.inf, f"omega is {self.omega}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class LocalNetworkConfig(NetworkConfig):
    """Small SIRENs 3 -> hidden x layers -> 1, one on each of many overlapping cells."""

    hidden: int = 32
    layers: int = 2
    omega: float = 15.0
    """Factor inside every sine; a cell is 2 wide in its own coordinates."""
    side: int = 16
    """Cells along each side of the cube."""
    margin: float = 0.2
    """Overlap of neighbouring cells, as a share of their width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(1 <= self.side <= 1024, f"side is {self.side}; it must be 1 to 1024")
        _require(0 < self.margin <= 1, f"margin is {self.margin}; it must be above 0 and at most 1")


_ONE_SIDED = frozenset({"surface", "normal", "off_surface"})
"""Terms that see the samples on the surface alone, or those off it."""


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the loss terms, in the convention of the official SIREN code.

    There the one-sided terms are averaged over on- and off-surface samples together, so that half of `surface`,
    `normal` and `off_surface` acts on the mean over their own samples.
    """

    surface: float = 6e3
    normal: float = 400.0
    off_surface: float = 100.0
    eikonal: float = 50.0
    distance: float = 200.0
    warm_start: float = 6e3

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            _require(0 <= weight < math.inf, f"weight of {name} is {weight}; it must be zero or positive")

    def for_noise(self, ratio: float) -> "LossWeights":
        """These weights with what ties phi to the points, and its gradient to their normals, multiplied by `ratio`."""
        return replace(self, surface=self.surface * ratio, normal=self.normal * ratio)

    def total(self, terms: "Mapping[str, Value]") -> "Value":
        """The weighted sum of `terms`, by their names."""
        weighted = [getattr(self, name) * (0.5 if name in _ONE_SIDED else 1.0) * term for name, term in terms.items()]
        total: Value = sum(weighted[1:], start=weighted[0])
        return total


def rise_and_fall(step: int, steps: int, warm_up_share: float, *, decay: bool = True) -> float:
    """The share of the highest learning rate at `step`: a linear rise, then half a cosine down to a thousandth."""
    rise = min(1.0, (step + 1) / max(1, round(warm_up_share * steps)))
    return rise * (0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-3 if decay else 1.0)


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """The samples in the space around the cloud, drawn once before the fit."""

    size: int = 100_000
    near_share: float = 0.7
    """Share scattered around the cloud; the rest is uniform in the cube."""
    near_sigma: float = 0.1
    """Mean standard deviation of the scattered ones."""
    inside_confidence: float = 0.4
    """A sample is trusted to be inside where the winding number w exceeds 1/2 by this; 0.5 and above trusts none."""
    outside_confidence: float = 0.2
    """And to be outside where w falls short of 1/2 by this.

    Smaller than the other, because the holes of a scan are where a scanner could not see: in hollows. A lid over a
    hollow is where w is 1/2, so that what w takes for outside is outside, while the surface lies deeper than the lid.
    """

    def __post_init__(self) -> None:
        _require(self.size >= 1000, f"pool size is {self.size}; it must be at least 1000")
        _require(0 <= self.near_share <= 1, f"near_share is {self.near_share}; it must be 0 to 1")
        _require(self.near_sigma > 0, f"near_sigma is {self.near_sigma}; it must be positive")
        for name in ("inside_confidence", "outside_confidence"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must not be negative")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How the network is fitted to the cloud."""

    steps: int = 1800
    batch_surface: int = 840
    """Points of the cloud in a step."""
    batch_space: int = 480
    """Samples of the pool in a step."""
    stratified: bool = True
    """Whether a step's samples are spread evenly over all, instead of drawn independently."""
    learning_rate: float = 1.2e-3
    """Of Adam, at its height. At width 96 collapse begins between 1.5e-3 and 1.8e-3, at width 256 at 1e-3."""
    beta2: float = 0.95
    """Decay of Adam's second moment; shorter than usual, because the schedule is."""
    warm_up_share: float = 0.02
    """Share of the steps over which the learning rate rises linearly."""
    decay: bool = True
    """Whether the learning rate then falls as a half cosine, to a thousandth."""
    warm_start_share: float = 0.2
    """Share of the steps, at the start, of plain regression on the signed nearest-point distance."""
    low_precision_share: float = 0.9
    """Share of the steps in bfloat16, from the start, on a processor with matrix instructions for it (AMX)."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient; None does not clip."""
    alpha: float = 100.0
    """Steepness of the off-surface term, per unit length."""
    untrusted_share: float = 0.2
    """Weight of the off-surface term where the sign is not trusted, as a share of its weight elsewhere.

    The term draws the smallest sheet over a hole in the data; the little that is left lets the surface run on smoothly.
    """
    weights: LossWeights = field(default_factory=LossWeights)
    reference_noise: float | None = 1.2e-3
    """Noise of the cloud that `weights` are for; the surface and normal weights go as its inverse. None fixes them.

    |phi| over the noise is the negative logarithm of a Laplace likelihood: points bind as far as they can be believed.
    """
    noise_range: tuple[float, float] = (1.0, 2.5)
    """Bounds of the factor that the noise puts on the weights; under 1 is no better on the noisiest clouds tried."""
    quadratic_noises: float = 1.0
    """Up to this many times the noise of the cloud the surface term is quadratic (Huber); 0 is the published |phi|."""
    omega_spacing: float | None = 3.0
    """Largest product of omega and the mean distance between neighbouring points; omega is lowered to it.

    Waves of a higher frequency fit between the points, and what no point contradicts does not settle. With omega 30 it
    matters above a distance of 0.1: on a few hundred points, unless their surface is small. None leaves omega alone.
    """
    pool: PoolConfig = field(default_factory=PoolConfig)

    def __post_init__(self) -> None:
        _require(1 <= self.steps <= 10_000_000, f"steps is {self.steps}; it must be 1 to 10,000,000")
        for name in ("batch_surface", "batch_space"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        rate = self.learning_rate
        _require(0 < rate < math.inf, f"learning_rate is {rate}; it must be positive")
        _require(0 <= self.beta2 < 1, f"beta2 is {self.beta2}; it must be in [0, 1)")
        for name in ("warm_up_share", "warm_start_share", "low_precision_share", "untrusted_share"):
            _require(0 <= getattr(self, name) <= 1, f"{name} is {getattr(self, name)}; it must be 0 to 1")
        width = self.quadratic_noises
        _require(0 <= width < math.inf, f"quadratic_noises is {width}; it must be zero or positive")
        clip = self.clip_norm
        _require(clip is None or clip > 0, f"clip_norm is {clip}; it must be positive")
        _require(0 < self.alpha < math.inf, f"alpha is {self.alpha}; it must be positive")
        waves = self.omega_spacing
        _require(waves is None or 0 < waves < math.inf, f"omega_spacing is {waves}; it must be positive")
        noise, (low, high) = self.reference_noise, self.noise_range
        _require(noise is None or 0 < noise < math.inf, f"reference_noise is {noise}; it must be positive")
        _require(0 < low <= high < math.inf, f"noise_range is ({low}, {high}); it must rise and be positive")

    def omega_for(self, omega: float, spacing: float) -> float:
        """The network's `omega`, or less for a cloud whose neighbouring points are `spacing` apart."""
        return omega if self.omega_spacing is None else min(omega, self.omega_spacing / max(spacing, 1e-12))

    def weights_for(self, noise: float) -> LossWeights:
        """The weights for a cloud with `noise`, the standard deviation of its points along the normals."""
        if self.reference_noise is None:
            return self.weights
        low, high = self.noise_range
        return self.weights.for_noise(min(high, max(low, self.reference_noise / max(noise, 1e-12))))

    @property
    def warm_start_steps(self) -> int:
        """Steps of plain regression at the start."""
        return round(self.warm_start_share * self.steps)

    def rate(self, step: int) -> float:
        """The learning rate at `step`, counted from 0."""
        return self.learning_rate * rise_and_fall(step, self.steps, self.warm_up_share, decay=self.decay)


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """Where local networks are put over the coarse one, and how they are fitted to the cloud and to it.

    Lengths are in units of a cell's half-width H unless the name says otherwise.
    """

    network: LocalNetworkConfig = field(default_factory=LocalNetworkConfig)
    """`side` is set for each level of cells."""
    points_per_cell: int = 160
    """Points that a surface through the middle of a cell has there, about: the width of cells follows from it."""
    most_cells: int = 1500
    """About as many cells as a cloud may get; they are wider where it would have more."""
    finest_side: int = 512
    """Most cells along a side of the cube."""
    fewest_points: int = 8
    """A cell with fewer, overlap included, gets no network."""
    steps: int = 250
    """At most; a fit stops when it has settled on its held-out points."""
    batch_surface: int = 64
    """Points of the cloud in a step, for each cell."""
    batch_space: int = 32
    """Samples of the pool in a step, for each cell."""
    pool: int = 512
    """Samples of the space in each cell, at which the coarse field is asked once; a quarter is held out of the fit."""
    learning_rate: float = 6e-3
    """Of Adam, at its height; it rises and falls as the coarse fit's."""
    beta2: float = 0.99
    warm_up_share: float = 0.08
    weights: LossWeights = field(
        default_factory=lambda: LossWeights(surface=600.0, normal=240.0, eikonal=5.0, distance=150.0)
    )
    reference_noise: float = 1.2e-3
    """Noise up to which `weights` hold; above it the surface and normal weights go as its inverse."""
    smallest_factors: tuple[float, float] = (0.1, 0.16)
    """Bounds from below of what the noise makes of the surface weight, and of the normal weight."""
    held_share: float = 0.125
    """Share of each cell's points that are held out of its fit, to judge it by."""
    trusted_distance: float = 0.02
    """The coarse field is a target where it is farther than this from zero."""
    slack: float = 0.3
    """Share of its value by which it may be wrong there, as it is at creases; a false sheet is off by the whole."""
    worth: float = 1.3
    """A cell is tried where the points are this many times farther from the coarse surface than their noise."""
    least_kept: float = 0.25
    """With fewer of all cells kept, by share, none is: what little is left of the error is then mostly noise."""
    clean_unit: float = 5e-4
    """Noise, unit frame, under which local networks are expected to pay, so that the coarse fit is cut short."""
    clean_side: int = 10
    """The same holds from so many cells along a side on: in wider ones there is more shape than so few waves have."""
    coarse_share: float = 0.5
    """What is left of the coarse fit's steps then."""
    steps_per_cell: float = 2.0
    """Steps of the coarse fit that take about as long as the fit of one cell; progress is told by it."""

    def __post_init__(self) -> None:
        counts = (
            "points_per_cell",
            "most_cells",
            "finest_side",
            "steps",
            "batch_surface",
            "batch_space",
        )
        for name in counts:
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        _require(self.fewest_points >= 2, f"fewest_points is {self.fewest_points}; it must be at least 2")
        _require(0 <= self.slack < 1, f"slack is {self.slack}; it must be in [0, 1)")
        _require(self.finest_side <= 1024, f"finest_side is {self.finest_side}; it must be at most 1024")
        _require(
            self.pool > 0 and self.pool % (4 * self.batch_space) == 0,
            f"pool is {self.pool}; it must be a multiple of four times batch_space, {self.batch_space}",
        )
        for name in ("held_share", "coarse_share", "least_kept"):
            _require(0 < getattr(self, name) < 1, f"{name} is {getattr(self, name)}; it must be between 0 and 1")
        for name in ("learning_rate", "reference_noise", "trusted_distance", "worth", "clean_unit"):
            _require(0 < getattr(self, name) < math.inf, f"{name} is {getattr(self, name)}; it must be positive")
        _require(0 <= self.beta2 < 1, f"beta2 is {self.beta2}; it must be in [0, 1)")
        _require(0 <= self.warm_up_share <= 1, f"warm_up_share is {self.warm_up_share}; it must be 0 to 1")

    def weights_for(self, noise: float) -> LossWeights:
        """The weights for points with `noise`, their standard deviation along the normals over H."""
        ratio = min(1.0, self.reference_noise / max(noise, 1e-12))
        surface, normal = (max(smallest, ratio) for smallest in self.smallest_factors)
        return replace(self.weights, surface=self.weights.surface * surface, normal=self.weights.normal * normal)

    def rate(self, step: int) -> float:
        """The learning rate at `step`, counted from 0."""
        return self.learning_rate * rise_and_fall(step, self.steps, self.warm_up_share)


SurfaceKind = Literal["auto", "closed", "open"]


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the surface is taken out of the field."""

    resolution: int | Literal["auto"] = "auto"
    """Grid cells along each side of the unit frame's cube [-1, 1]^3; auto follows the detail of the field."""
    auto_range: tuple[int, int] = (256, 512)
    """Bounds of an automatic resolution."""
    level_world: float = 0.0
    """Signed distance of the surface that is extracted, in world units: positive is an outer offset."""
    shell_world: float | None = None
    """Thickness of a wall behind that surface, in world units: inward, towards lower levels; None is no wall."""
    surface: SurfaceKind = "auto"
    """Whether what no points support is cut away; auto does so where the cloud is that of an open surface."""
    trim_distance_world: float | None = None
    """Drop what is farther than this from every input point, in world units; None keeps a closed surface."""
    drop_unsupported: bool = True
    """Drop connected components that hardly any input point is nearest to: sheets that no measurement supports."""
    min_component_share: float = 0.0
    """Drop connected components with less than this share of the largest one's area."""
    target_faces: int | None = None
    """Simplify to about this many faces; None keeps them all."""
    projection_steps: int = 2
    """Clamped Newton steps that move each vertex onto the level set."""
    sharp: bool = False
    """Give the mesh the creases that the cloud has; only for the surface itself, at level 0."""

    def __post_init__(self) -> None:
        for cells in (*self.auto_range, *(() if self.resolution == "auto" else (self.resolution,))):
            _require(8 <= cells <= 4096, f"resolution is {cells}; it must be 8 to 4096, or auto")
        _require(math.isfinite(self.level_world), f"level is {self.level_world}; it must be finite")
        _require(self.surface in get_args(SurfaceKind), f"surface is {self.surface!r}; it must be auto, closed or open")
        shell = self.shell_world
        _require(shell is None or 0 < shell < math.inf, f"shell is {shell}; it must be a positive thickness")
        trim = self.trim_distance_world
        _require(trim is None or 0 < trim < math.inf, f"trim distance is {trim}; it must be positive")
        _require(
            shell is None or trim is None,
            f"a shell of {shell} is closed, and a trim distance of {trim} would cut it open; give one of them",
        )
        _require(
            shell is None or self.surface != "open", f"a shell of {shell} is closed; it cannot have an open surface"
        )
        share = self.min_component_share
        _require(0 <= share <= 1, f"min_component_share is {share}; it must be 0 to 1")
        faces = self.target_faces
        _require(faces is None or faces >= 4, f"target_faces is {faces}; it must be at least 4")
        _require(0 <= self.projection_steps <= 10, f"projection_steps is {self.projection_steps}; it must be 0 to 10")
        level = self.level_world
        _require(not self.sharp or level == 0, f"sharp needs level 0, and level is {level}: leave one of them out")
        _require(not self.sharp or shell is None, "sharp keeps creases of the surface, not of a shell: choose one")

    @property
    def is_offset(self) -> bool:
        """Whether another surface than that of phi = 0 is wanted."""
        return bool(self.level_world) or self.shell_world is not None

    @property
    def surface_asked(self) -> SurfaceKind:
        """`surface`; auto is closed with a shell, and with a distance to trim at, which opens it well enough."""
        decided = self.trim_distance_world is not None or self.shell_world is not None
        return "closed" if self.surface == "auto" and decided else self.surface

    def resolution_for(self, detail: int) -> int:
        """The resolution for a field whose finest waves want `detail` cells along each side of the cube."""
        low, high = self.auto_range
        return max(low, min(high, detail)) if self.resolution == "auto" else self.resolution

    @property
    def finest(self) -> int:
        """The resolution, or the most that an automatic one may be."""
        return self.auto_range[1] if self.resolution == "auto" else self.resolution


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named set of settings."""

    summary: str
    network: NetworkConfig = field(default_factory=NetworkConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    local: LocalConfig | None = None
    """The second stage; None leaves it out."""
    mesh: MeshConfig = field(default_factory=MeshConfig)


PRESETS: Mapping[str, Preset] = {
    "draft": Preset(
        summary="a first look",
        fit=FitConfig(steps=1000, learning_rate=1.4e-3, pool=PoolConfig(size=50_000)),
    ),
    "standard": Preset(summary="scans, noise, sparse clouds", local=LocalConfig()),
    "fine": Preset(
        summary="dense, clean clouds and small detail",
        network=NetworkConfig(hidden=128),
        fit=FitConfig(steps=4000, learning_rate=9e-4, beta2=0.97, low_precision_share=0.8),
        local=LocalConfig(points_per_cell=110, most_cells=4000, steps=500, coarse_share=0.3),
        mesh=MeshConfig(auto_range=(512, 1024)),
    ),
    "paper": Preset(
        summary="the published SIREN recipe, for comparison: slow, and it may leave sheets off the surface",
        network=NetworkConfig(hidden=256),
        fit=FitConfig(
            steps=10_000,
            batch_surface=1400,
            batch_space=1400,
            stratified=False,
            learning_rate=1e-4,
            beta2=0.999,
            warm_up_share=0.0,
            decay=False,
            warm_start_share=0.0,
            low_precision_share=0.0,
            clip_norm=1.0,
            untrusted_share=1.0,
            reference_noise=None,
            quadratic_noises=0.0,
            omega_spacing=None,
            weights=LossWeights(surface=3e3, normal=100.0, off_surface=100.0, eikonal=50.0, distance=0.0),
            pool=PoolConfig(near_share=0.0, inside_confidence=math.inf, outside_confidence=math.inf),
        ),
    ),
}
"""Presets by name, from quick to careful; `paper` is Sitzmann et al. 2020 as their code runs it."""


def preset_named(name: str) -> Preset:
    """The preset called `name`. Raises ConfigError where there is none."""
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; use one of {', '.join(PRESETS)}")
    return PRESETS[name]
