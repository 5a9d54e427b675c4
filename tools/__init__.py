"""Tools for developers of kernels, without a GPU or with one. Run each from the repository's root.

python -m tools.compiled   what the compiler makes of every kernel, without a GPU
python -m tools.traffic    the memory traffic of a launch, in a model of the caches
python -m tools.host       the host's time of a call
python -m tools.tune       the best cut of a pooling's launches, on a GPU
python -m tools.gpu        everything that only a GPU can say, in one command
"""
