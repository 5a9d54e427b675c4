"""Plain PyTorch: what every operation computes, exactly and differentiably, and how it runs where no kernel does."""
