"""Analytic clouds for the tests."""

import math

import numpy as np
from numpy.typing import NDArray

from sdfserver.cloud import PointCloud


def directions(n: int, seed: int = 0) -> NDArray[np.float64]:
    """n evenly drawn unit vectors (n, 3)."""
    x = np.random.default_rng(seed).normal(size=(n, 3))
    unit: NDArray[np.float64] = x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit


def sphere(n: int = 2000, *, radius: float = 1.0, seed: int = 0) -> PointCloud:
    """n points of a sphere, normals outward."""
    normals = directions(n, seed)
    return PointCloud(points=radius * normals, normals=normals)


def even_sphere(n: int) -> PointCloud:
    """n points spread evenly over the unit sphere, along Fibonacci's spiral; normals outward."""
    z = 1 - (2 * np.arange(n) + 1) / n
    turn = np.pi * (1 + math.sqrt(5)) * np.arange(n)
    radius = np.sqrt(1 - z * z)
    normals = np.stack([radius * np.cos(turn), radius * np.sin(turn), z], axis=1)
    return PointCloud(points=normals, normals=normals)


def torus(n: int = 4000, *, major: float = 0.65, minor: float = 0.25, seed: int = 0) -> PointCloud:
    """n points of a torus about the z axis, normals outward."""
    rng = np.random.default_rng(seed)
    u, v = rng.random(4 * n) * 2 * np.pi, rng.random(4 * n) * 2 * np.pi
    keep = rng.random(4 * n) < (major + minor * np.cos(v)) / (major + minor)  # area is wider outside
    u, v = u[keep][:n], v[keep][:n]
    normals = np.stack([np.cos(u) * np.cos(v), np.sin(u) * np.cos(v), np.sin(v)], axis=1)
    ring = np.stack([np.cos(u), np.sin(u), np.zeros_like(u)], axis=1)
    return PointCloud(points=major * ring + minor * normals, normals=normals)


def bowl(n: int = 2000, *, seed: int = 0) -> PointCloud:
    """The lower half of the unit sphere: open above, normals outward."""
    normals = directions(n, seed)
    normals[:, 2] = -np.abs(normals[:, 2])
    return PointCloud(points=normals, normals=normals)


def rippled_sphere(
    n: int, *, height: float = 0.03, waves: float = 12.0, noise: float = 0.0, seed: int = 0
) -> PointCloud:
    """n points of a unit sphere with ripples, normals outward; `noise` moves points along the normals."""
    d = directions(n, seed)
    sines, cosines = np.sin(waves * d), np.cos(waves * d)
    radius = 1 + height * sines.prod(axis=1, keepdims=True)
    others = np.stack([sines[:, 1] * sines[:, 2], sines[:, 0] * sines[:, 2], sines[:, 0] * sines[:, 1]], axis=1)
    slope = height * waves * cosines * others
    slope -= (slope * d).sum(axis=1, keepdims=True) * d
    normals = radius * d - slope
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    moved = noise * np.random.default_rng(seed + 1).normal(size=(n, 1)) * normals
    return PointCloud(points=radius * d + moved, normals=normals)
