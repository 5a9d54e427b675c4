"""Shared code: geometry, layouts, precision, checks, autograd state, paths and random numbers."""
