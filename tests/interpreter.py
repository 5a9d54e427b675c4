"""Corrections to Triton's interpreter that make it right and fast, for the tests and the tools."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_splat = InterpreterBuilder.create_splat


def _splatted(builder: Any, ret_ty: Any, arg: TensorHandle) -> TensorHandle:
    """A block of conditions from one; in 3.9 it is of integers, which no load takes for a mask."""
    if arg.data.dtype == np.bool_:
        arg = TensorHandle(arg.data, tl.int1)
    return _splat(builder, ret_ty, arg)


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """Corrects the interpreter within the block.

    A launch puts the interpreter's functions into Triton's modules, and so does each call of one
    jit function by another within it, which takes most of a launch's time. Once for each module is
    enough, until the launch takes them out again.
    """
    put_in, done, modules_of = interpreter._patch_lang, set(), {}

    def once(function):
        names = function.__globals__
        if id(names) not in modules_of:
            modules = frozenset(id(value) for value in names.values() if inspect.ismodule(value))
            # The names are kept, so that their id is never that of others.
            modules_of[id(names)] = modules, names
        modules, _ = modules_of[id(names)]
        if modules in done:
            return None
        done.add(modules)
        scope = put_in(function)
        restore = scope.restore
        scope.restore = lambda: (done.clear(), restore())
        return scope

    # The minimum of NaN and a number is the number, as tl.minimum says; before 3.8 it was NaN.
    corrected = {
        "create_minnumf": lambda builder, a, b: builder.binary_op(a, b, np.fmin),
        "create_maxnumf": lambda builder, a, b: builder.binary_op(a, b, np.fmax),
        "create_splat": _splatted,
    }
    with (
        patch.multiple(InterpreterBuilder, **corrected),
        patch.object(interpreter, "_patch_lang", once),
    ):
        yield
