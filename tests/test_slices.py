"""Slices: outlines of exact shapes, where they lie, how they run, and the files that they are written to."""

import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from test_queries import CENTER, SCALE, Exact, sphere_distance, torus_distance

from sdfserver.errors import ConfigError
from sdfserver.export.slices import Plane, Slice, slice_field, to_dxf, to_svg

SVG = "{http://www.w3.org/2000/svg}"


def cut(field: Exact, unit_normal: list[float], unit_origin: list[float], resolution: int = 128) -> Slice:
    """Across a plane that is given in the unit frame."""
    return slice_field(field, Plane.through(np.array(unit_origin) / SCALE + CENTER, unit_normal), resolution=resolution)


def half_a_ball(x: np.ndarray) -> np.ndarray:
    """A ball of radius 0.7 about a point on the cube's face x = 1."""
    return np.linalg.norm(x - [1.0, 0, 0], axis=1) - 0.7


@pytest.mark.parametrize(("axis", "columns"), [("x", [1, 2]), ("y", [0, 2]), ("z", [0, 1])])
def test_a_sphere_s_slice_is_a_circle_in_the_world_s_own_coordinates(axis: str, columns: list[int]) -> None:
    field, offset = Exact(sphere_distance), 0.3
    plane = Plane.across(axis, CENTER["xyz".index(axis)] + offset / SCALE)  # type: ignore[arg-type]
    (curve,) = slice_field(field, plane).curves
    assert curve.closed
    radius = np.sqrt(0.7**2 - offset**2) / SCALE
    np.testing.assert_allclose(np.linalg.norm(curve.points - CENTER[columns], axis=1), radius, rtol=2e-6)
    # A polygon within the circle: two parts in a thousand at most for cells of a hundredth.
    assert curve.area == pytest.approx(np.pi * radius**2, rel=5e-4)
    assert curve.length == pytest.approx(2 * np.pi * radius, rel=5e-4)
    np.testing.assert_allclose(field.at((plane.to_world(curve.points) - CENTER) * SCALE, 0)[0], 0, atol=1e-6)


def test_a_hole_runs_the_other_way_around() -> None:
    found = cut(Exact(torus_distance), [0, 0, 1], [0, 0, 0])
    areas = sorted(curve.area for curve in found.curves)
    np.testing.assert_allclose(areas, [-np.pi * 0.4**2 / SCALE**2, np.pi * 0.9**2 / SCALE**2], rtol=2e-3)
    assert found.area == pytest.approx(np.pi * (0.9**2 - 0.4**2) / SCALE**2, rel=2e-3)
    (one, other) = cut(Exact(torus_distance), [1, 0, 0], [0, 0, 0]).curves
    assert one.area == pytest.approx(np.pi * 0.25**2 / SCALE**2, rel=2e-3)
    assert other.area == pytest.approx(one.area, rel=1e-3)


def test_any_plane_cuts_and_z_is_up() -> None:
    normal = np.array([1.0, -2.0, 0.5])
    plane = Plane.through(CENTER, 1e200 * normal)
    axes = np.stack([plane.right, plane.up, plane.normal])
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(plane.normal, normal / np.linalg.norm(normal))
    assert plane.right[2] == 0
    assert plane.up[2] > 0
    (curve,) = slice_field(Exact(sphere_distance), plane).curves
    np.testing.assert_allclose(np.linalg.norm(curve.points, axis=1), 0.7 / SCALE, rtol=2e-6)


def test_a_surface_that_leaves_the_cube_has_an_open_outline() -> None:
    (curve,) = cut(Exact(half_a_ball), [0, 0, 1], [0, 0, 0]).curves
    assert not curve.closed
    assert curve.area == 0
    assert curve.length == pytest.approx(np.pi * 0.7 / SCALE, rel=2e-3)
    np.testing.assert_allclose(np.abs(curve.points[[0, -1]]), [[1 / SCALE, 0.7 / SCALE]] * 2, rtol=1e-5)
    # An oblique plane's window reaches out of the cube, where nothing is drawn.
    (oblique,) = cut(Exact(half_a_ball), [0, 1, 2], [0, 0, 0]).curves
    assert not oblique.closed
    assert (np.abs(oblique.points[:, 0]) <= 1 / SCALE * (1 + 1e-9)).all()


def test_a_plane_that_misses_leaves_an_empty_drawing() -> None:
    field = Exact(sphere_distance)
    for place in (0.8, 1.5):
        found = cut(field, [0, 0, 1], [0, 0, place])
        assert found.curves == ()
        ET.fromstring(to_svg(found))  # noqa: S314 - our own
        assert "POLYLINE" not in to_dxf(found)


def test_thinner_than_the_cells_is_found_with_finer_ones() -> None:
    field = Exact(lambda x: np.linalg.norm(x - [0.011, 0.017, 0], axis=1) - 0.006)
    assert cut(field, [0, 0, 1], [0, 0, 0], 32).curves == ()
    assert len(cut(field, [0, 0, 1], [0, 0, 0], 1024).curves) == 1


@pytest.mark.parametrize("far", [False, True])
def test_the_svg_holds_the_outline_upwards_in_world_units(far: bool) -> None:
    field = Exact(lambda x: sphere_distance(x - [0, 0.2, 0]))
    field.frame = field.frame if far else type(field.frame)(center=np.array([3.0, 40.0, 5.0]), scale=SCALE)
    found = slice_field(field, Plane.across("z", field.frame.center[2]))
    root = ET.fromstring(to_svg(found))  # noqa: S314 - our own
    x, y, width, height = map(float, root.get("viewBox", "").split())
    offset = np.array(list(map(float, root.get("data-offset", "").split())))
    assert offset.any() == far
    (path,) = root.iter(f"{SVG}path")
    text = path.get("d", "")
    assert text.startswith("M")
    assert text.endswith(" Z")
    points = np.array([[float(part) for part in pair.split(",")] for pair in re.findall(r"[ML]([-\d.,e+]+)", text)])
    np.testing.assert_allclose(points + offset, found.curves[0].points, atol=1e-5 / SCALE)
    assert np.abs(points).max() < 200 / SCALE, "what single precision can tell apart"
    (group,) = root.iter(f"{SVG}g")
    assert (group.get("transform") or "").startswith("scale(1 -1)")
    drawn = points * [1, -1]
    assert ((drawn > [x, y]) & (drawn < [x + width, y + height])).all()
    np.testing.assert_allclose([width, height], 1.4 * 1.1 / SCALE, rtol=1e-3)
    whole = ET.fromstring(to_svg(found, whole=True)).get("viewBox", "")  # noqa: S314 - our own
    np.testing.assert_allclose(list(map(float, whole.split()))[2:], 2 * 1.1 / SCALE, rtol=1e-6)
    # Its top, which is its largest y, is what a viewer draws highest.
    assert drawn[:, 1].min() == pytest.approx(offset[1] - (field.frame.center[1] + 0.9 / SCALE), rel=1e-4)


def test_the_dxf_is_read_by_another_program(tmp_path: Path) -> None:
    ezdxf = pytest.importorskip("ezdxf")
    found = cut(Exact(torus_distance), [0, 0, 1], [0, 0, 0])
    document = ezdxf.read(io.StringIO(to_dxf(found)))
    assert document.dxfversion == "AC1009"
    assert not document.audit().errors
    lines = list(document.modelspace())
    assert [line.dxftype() for line in lines] == ["POLYLINE", "POLYLINE"]
    for line, curve in zip(lines, found.curves, strict=True):
        assert line.is_closed
        points = np.array([vertex.dxf.location for vertex in line.vertices])
        np.testing.assert_allclose(points[:, :2], curve.points, atol=1e-5 / SCALE)
    (open_line,) = ezdxf.read(io.StringIO(to_dxf(cut(Exact(half_a_ball), [0, 0, 1], [0, 0, 0])))).modelspace()
    assert not open_line.is_closed


def test_what_is_no_plane_is_refused_with_the_value() -> None:
    with pytest.raises(ConfigError, match="the normal 0, 0, 0"):
        Plane.through([0, 0, 0], [0, 0, 0])
    with pytest.raises(ConfigError, match="the origin nan, 0, 0"):
        Plane.through([np.nan, 0, 0], [0, 0, 1])
    with pytest.raises(ConfigError, match="place of a slice is inf"):
        Plane.across("z", np.inf)
    with pytest.raises(ConfigError, match="resolution of a slice is 5000"):
        slice_field(Exact(sphere_distance), Plane.across("z", CENTER[2]), resolution=5000)
