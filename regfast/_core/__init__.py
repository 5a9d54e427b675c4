"""What the rooms of regfast share: geometry, layouts, precision, checks, autograd's state, paths, random numbers."""
