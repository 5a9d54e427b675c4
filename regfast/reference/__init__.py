"""Plain PyTorch: the exact, differentiable specification of every operation, and the fallback."""
