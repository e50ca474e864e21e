"""A ball as a field, made in a moment: for tests of what is done with a field, and not of its fit."""

import numpy as np
import torch

from sdfserver.cloud import Frame
from sdfserver.config import NetworkConfig
from sdfserver.field import SignedDistanceField
from sdfserver.siren import Siren

CENTER, SCALE = np.array([432_100.25, 5_411_200.5, 312.125]), 0.02
RADIUS = 0.6 / SCALE


def ball_field() -> SignedDistanceField:
    """A network of random sines whose last layer is the least squares fit to the distance from a ball of RADIUS."""
    siren = Siren(NetworkConfig(hidden=256, layers=2, omega=4.0), generator=torch.Generator().manual_seed(0))
    x = torch.rand(8000, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        h = x
        for weight, bias in siren._scaled_layers(torch.float32)[:-1]:
            h = (h @ weight + bias).sin()
        known = torch.cat([h, torch.ones(len(h), 1)], dim=1).double()
        wanted = (x.norm(dim=1, keepdim=True) - RADIUS * SCALE).double()
        # Some ridge keeps the weights small, and with them what float32 rounds.
        ridge = known.T @ known + 1e-4 * torch.eye(known.shape[1], dtype=torch.float64)
        found = torch.linalg.solve(ridge, known.T @ wanted)
        siren.weights[-1].copy_(found[:-1].T)
        siren.biases[-1].copy_(found[-1])
    return SignedDistanceField(siren, Frame(center=CENTER, scale=SCALE))
