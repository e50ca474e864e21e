"""What can be compared, and for how long: names, without torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sdfserver.errors import ConfigError

TITLES: Mapping[str, str] = {
    "siren": "SIREN",
    "snake": "Snake",
    "sine": "self-normalising sine",
    "relu": "ReLU",
    "leaky": "leaky ReLU",
    "tanh": "tanh",
    "softplus": "softplus",
    "swish": "swish",
    "elu": "ELU",
    "selu": "SELU",
    "gelu": "GELU",
}
ENCODINGS: Mapping[str, str] = {"none": "", "pe": ", positional encoding", "rotated": ", rotated encoding"}
PLAIN = tuple(TITLES)[3:]
"""Networks without waves of their own."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A network to be compared: its name and its encoding's. Raises ConfigError where there is no such thing."""

    name: str
    encoding: str = "none"

    def __post_init__(self) -> None:
        if self.name not in TITLES:
            raise ConfigError(f"there is no network {self.name!r}; use one of {', '.join(TITLES)}")
        if self.encoding not in ENCODINGS:
            raise ConfigError(f"there is no encoding {self.encoding!r}; use one of {', '.join(ENCODINGS)}")
        if self.name == "siren" and self.encoding != "none":
            raise ConfigError(f"siren takes no encoding, but was given {self.encoding!r}; its first layer is one")

    @property
    def title(self) -> str:
        """As people call it."""
        return TITLES[self.name] + ENCODINGS[self.encoding]

    @property
    def written(self) -> str:
        """As it is asked for."""
        return self.name if self.encoding == "none" else f"{self.name}+{self.encoding}"


def choice_named(text: str) -> Choice:
    """The choice that is written NAME or NAME+ENCODING. Raises ConfigError."""
    name, plus, encoding = text.strip().partition("+")
    return Choice(name=name, encoding=encoding if plus else "none")


def choices_named(text: str) -> list[Choice]:
    """The choices that are written with commas between. Raises ConfigError."""
    choices = [choice_named(part) for part in text.split(",")]
    if len(set(choices)) < len(choices):
        raise ConfigError(f"the networks are {text!r}; name each once")
    return choices


DEFAULT = ",".join(["siren", "snake", "sine+rotated", *(f"{name}{more}" for name in PLAIN for more in ("", "+pe"))])
"""All that are set against each other."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to fit: so many `steps`, or as many as take so many `seconds`; one of the two."""

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ConfigError("give a number of steps or of seconds, one of the two")
        if self.steps is not None and not 1 <= self.steps <= 1_000_000:
            raise ConfigError(f"steps is {self.steps}; it must be 1 to 1,000,000")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ConfigError(f"seconds is {self.seconds}; it must be positive")

    def share(self, step: int, seconds: float) -> float:
        """How much of it is spent after so many steps and seconds."""
        return step / self.steps if self.steps is not None else seconds / (self.seconds or math.inf)

    def __str__(self) -> str:
        return f"{self.steps:,} steps" if self.steps is not None else f"{self.seconds:g} seconds"
