"""SignedDistanceField: what a fit leaves behind, in world units.

sdf < 0 inside. World in and out for `evaluate`, `gradient` and what FieldQueries adds; `value`, `value_and_gradient`
and `at` are the same field in the unit frame, the first two on the network's device, for the extraction.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdfserver.cloud import Frame
from sdfserver.config import LocalNetworkConfig, NetworkConfig
from sdfserver.errors import ConfigError, FieldFormatError
from sdfserver.files import replacing
from sdfserver.local import LocalLevel, LocalSirens, PartitionOfUnity
from sdfserver.queries import FieldQueries
from sdfserver.saved import FORMAT, PARTITION_FORMAT
from sdfserver.siren import Siren

CHUNK = 65_536
BENT_CHUNK = 8192, 65_536
"""Points whose second derivatives are taken at a time, on a CPU and elsewhere."""
DETAIL = 256
"""Cells along each side of the cube that show what a single network can."""


class SignedDistanceField(FieldQueries):
    """A network, or a partition of unity of many, and the frame it lives in.

    Its value is a distance near the surface; `distance` gives one anywhere, `distance_error` how near it is to one.
    """

    def __init__(self, network: Siren | PartitionOfUnity, frame: Frame) -> None:
        self.network = network.requires_grad_(False).eval()
        self.frame = frame

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def detail(self) -> int:
        """Cells along each side of the cube [-1, 1]^3 that the field's finest waves want in a mesh."""
        return self.network.detail if isinstance(self.network, PartitionOfUnity) else DETAIL

    def value(self, x: Tensor) -> Tensor:
        """The field (n,) at unit points x (n, 3)."""
        phi: Tensor = self.network(x)
        return phi

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The field (n,) and its gradient (n, 3) at unit points x (n, 3)."""
        return self.network.value_and_gradient(x)

    def evaluate(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Signed distance (n,), world units, at `points` (n, 3), world units."""
        values = [self.value(x).cpu() for x in self._unit_chunks(points)]
        return _numpy(values, (0,)) / self.frame.scale

    def gradient(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Gradient (n, 3) of the signed distance at `points` (n, 3), world units; its length is about 1."""
        return _numpy([self.value_and_gradient(x)[1].cpu() for x in self._unit_chunks(points)], (0, 3))

    def at(self, x: NDArray[np.float64], order: int) -> tuple[NDArray[np.float64], ...]:
        """At unit points x (n, 3): the value (n,), from order 1 on the gradient, for order 2 the Hessian as well."""
        size = CHUNK if order < 2 else BENT_CHUNK[self.device.type != "cpu"]
        ask = [lambda x: (self.value(x),), self.value_and_gradient, self.network.value_gradient_and_hessian][order]
        dtype = next(self.network.parameters()).dtype
        out = tuple(np.empty((len(x), *shape)) for shape in ((), (3,), (3, 3))[: order + 1])
        for start in range(0, len(x), size):
            part = torch.tensor(x[start : start + size], dtype=dtype, device=self.device)
            for array, values in zip(out, ask(part), strict=True):
                array[start : start + size] = values.cpu().numpy()
        return out

    def save(self, path: str | Path) -> None:
        """Write the field as safetensors: completely, or not at all. Raises OutputError where that cannot be done."""
        from safetensors.torch import save

        network = self.network
        levels = [asdict(level.config) for level in network.levels] if isinstance(network, PartitionOfUnity) else []
        # Floats as JSON keep every bit, so that a field at large coordinates comes back where it was.
        about = {
            "format": PARTITION_FORMAT if levels else FORMAT,
            "network": asdict(network.config),
            **({"levels": levels} if levels else {}),
            "frame": {"center": self.frame.center.tolist(), "scale": self.frame.scale},
        }
        tensors = {name: value.contiguous().cpu() for name, value in network.state_dict().items()}
        with replacing(path) as stream:
            stream.write(save(tensors, metadata={"sdfserver": json.dumps(about)}))

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> "SignedDistanceField":
        """The field that `save` wrote to `path`. Raises FieldFormatError when it is not one."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                about = json.loads((file.metadata() or {})["sdfserver"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            if about["format"] not in (FORMAT, PARTITION_FORMAT):
                raise FieldFormatError(
                    f"{path} has format {about['format']!r}; this version reads {FORMAT!r} and {PARTITION_FORMAT!r}"
                )
            coarse = Siren(NetworkConfig(**about["network"]))
            network: Siren | PartitionOfUnity = coarse
            if about["format"] == PARTITION_FORMAT:
                network = PartitionOfUnity(coarse, [_level(i, about, tensors) for i in range(len(about["levels"]))])
            network.to(device).load_state_dict(tensors)
            frame = Frame(
                center=np.array(about["frame"]["center"], dtype=np.float64), scale=float(about["frame"]["scale"])
            )
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError, ConfigError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FieldFormatError(f"{path} is not a field saved by sdfserver: {reason}") from error
        return cls(network, frame)

    def _unit_chunks(self, points: NDArray[np.float64]) -> tuple[Tensor, ...]:
        unit = self.frame.to_unit(np.asarray(points, dtype=np.float64).reshape(-1, 3))
        dtype = next(self.network.parameters()).dtype
        return torch.split(torch.tensor(unit, dtype=dtype, device=self.device), CHUNK)


def _level(i: int, about: dict[str, Any], tensors: dict[str, Tensor]) -> LocalLevel:
    cells = tensors[f"level.{i}.cells"]
    return LocalLevel(cells, LocalSirens(len(cells), LocalNetworkConfig(**about["levels"][i])))


def _numpy(parts: list[Tensor], empty: tuple[int, ...]) -> NDArray[np.float64]:
    joined: NDArray[np.float64] = (torch.cat(parts) if parts else torch.empty(empty)).double().numpy()
    return joined
