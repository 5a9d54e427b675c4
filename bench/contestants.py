"""Who is timed against whom, and on what: one `Operation` for each of regfast's, and for what is made of them.

A new operation is a row of `OPERATIONS` and a file bench_<operation>.py.
"""

from __future__ import annotations

from mixings import MIXINGS
from networks import NETWORKS
from poolings import POOLINGS
from residuals import RESIDUALS

OPERATIONS = POOLINGS | MIXINGS | RESIDUALS | NETWORKS
# Those that are one function of regfast's.
FUNCTIONS = [name for name, operation in OPERATIONS.items() if operation.function is not None]
