"""Tools for developers of kernels. From the root of the repository: `python -m tools.compiled`."""
