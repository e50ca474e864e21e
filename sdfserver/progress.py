"""How a reconstruction gets on. Without torch: it is told of between processes, and not all of them have any."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a reconstruction stands: `fraction` runs from 0 to 1 over all stages."""

    stage: str
    fraction: float
    step: int | None = None
    steps: int | None = None
    losses: dict[str, float] = field(default_factory=dict)
    tile: int | None = None
    tiles: int | None = None
    eta_s: float | None = None
