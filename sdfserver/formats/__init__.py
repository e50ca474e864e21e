"""Readers of clouds, a module for each family of formats: bytes in, PointCloud or CloudFormatError out."""
