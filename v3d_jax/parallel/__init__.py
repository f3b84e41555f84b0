"""Placement of arrays on devices: mesh, sharding rules, several hosts."""
