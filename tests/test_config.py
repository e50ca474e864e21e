"""Settings are checked where they are made, and presets are what they say."""

from typing import Any

import pytest

from sdfserver.config import (
    PRESETS,
    FitConfig,
    LocalConfig,
    LocalNetworkConfig,
    LossWeights,
    MeshConfig,
    NetworkConfig,
    PoolConfig,
)
from sdfserver.errors import ConfigError


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (NetworkConfig, {"hidden": 0}),
        (NetworkConfig, {"omega": -1.0}),
        (LossWeights, {"surface": float("nan")}),
        (PoolConfig, {"near_share": 1.5}),
        (FitConfig, {"steps": 0}),
        (FitConfig, {"learning_rate": 0.0}),
        (FitConfig, {"warm_start_share": 2.0}),
        (FitConfig, {"noise_range": (2.0, 1.0)}),
        (FitConfig, {"omega_spacing": 0.0}),
        (LocalConfig, {"points_per_cell": 0}),
        (LocalConfig, {"fewest_points": 1}),
        (LocalConfig, {"finest_side": 2000}),
        (LocalConfig, {"pool": 100}),
        (LocalConfig, {"held_share": 0.0}),
        (LocalConfig, {"worth": -1.0}),
        (LocalConfig, {"slack": 1.0}),
        (LocalNetworkConfig, {"margin": 0.0}),
        (LocalNetworkConfig, {"side": 0}),
        (MeshConfig, {"auto_range": (4, 512)}),
        (MeshConfig, {"resolution": 4}),
        (MeshConfig, {"target_faces": 2}),
        (MeshConfig, {"level_world": float("inf")}),
        (MeshConfig, {"trim_distance_world": -1.0}),
        (MeshConfig, {"shell_world": 0.0}),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_name_and_value(kind: Any, settings: dict[str, Any]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(ConfigError) as caught:
        kind(**settings)
    shown = str(value[0]) if isinstance(value, tuple) else str(value)
    assert shown in str(caught.value)
    assert name.split("_")[0] in str(caught.value)


def test_sharp_edges_are_for_the_surface_itself() -> None:
    assert MeshConfig(sharp=True).sharp
    with pytest.raises(ConfigError, match=r"sharp needs level 0, and level is 0\.5"):
        MeshConfig(sharp=True, level_world=0.5)


def test_presets_cost_more_from_draft_to_paper() -> None:
    steps = [PRESETS[name].fit.steps for name in ("draft", "standard", "fine", "paper")]
    assert steps == sorted(set(steps))


def test_cleaner_points_bind_harder_within_bounds() -> None:
    config = FitConfig()
    reference = config.reference_noise
    assert reference is not None
    surface = [config.weights_for(noise).surface for noise in (0.0, reference / 2, reference, reference * 100)]
    low, high = config.noise_range
    assert surface == pytest.approx([factor * config.weights.surface for factor in (high, 2, 1, low)])
    assert config.weights_for(reference / 2).eikonal == config.weights.eikonal
    assert PRESETS["paper"].fit.weights_for(0.0) == PRESETS["paper"].fit.weights


def test_points_far_apart_lower_omega_but_not_for_the_published_recipe() -> None:
    config = FitConfig()
    assert [config.omega_for(30.0, spacing) for spacing in (0.0, 0.05, 0.2)] == pytest.approx([30, 30, 15])
    assert config.omega_for(5.0, 0.2) == 5
    assert PRESETS["paper"].fit.omega_for(30.0, 0.2) == 30
