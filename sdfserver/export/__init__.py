"""What can be made of a field besides a mesh: outlines in a plane, grids of values, the network for other programs."""
