"""The seam: each operation's schema, fake, implementation, autograd Function, and the public function that chooses a path."""
