"""Triton's interpreter, right in what it gets wrong and fast in what makes it slow: for tests, and tools that use it."""

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


def _minimum(builder: Any, a: TensorHandle, b: TensorHandle) -> TensorHandle:
    """The minimum of NaN and a number is the number, as on a GPU and in tl.minimum's documentation. (Until 3.8 it is NaN.)"""
    return builder.binary_op(a, b, np.fmin)


def _maximum(builder: Any, a: TensorHandle, b: TensorHandle) -> TensorHandle:
    """The maximum likewise, but where NaN is to be propagated, which is another function."""
    return builder.binary_op(a, b, np.fmax)


_splat = InterpreterBuilder.create_splat


def _splatted(builder: Any, ret_ty: Any, arg: TensorHandle) -> TensorHandle:
    """A block of one condition is a block of conditions. (In 3.9 one of integers, which no load takes for its mask.)"""
    if arg.data.dtype == np.bool_:
        arg = TensorHandle(arg.data, tl.int1)
    return _splat(builder, ret_ty, arg)


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """Within the block the interpreter is mended.

    A launch puts the interpreter's functions into Triton's modules, and so does each call of one jit function by another within
    it, which takes most of a launch's time. Once for each module is enough, until the launch takes them out again.
    """
    put_in, done, modules_of = interpreter._patch_lang, set(), {}

    def once(function):
        names = function.__globals__
        if id(names) not in modules_of:
            # With the names, so that no others are ever found under their id.
            modules_of[id(names)] = frozenset(id(value) for value in names.values() if inspect.ismodule(value)), names
        modules, _ = modules_of[id(names)]
        if modules in done:
            return None
        done.add(modules)
        scope = put_in(function)
        restore = scope.restore
        scope.restore = lambda: (done.clear(), restore())
        return scope

    with (
        patch.object(InterpreterBuilder, "create_minnumf", _minimum),
        patch.object(InterpreterBuilder, "create_maxnumf", _maximum),
        patch.object(InterpreterBuilder, "create_splat", _splatted),
        patch.object(interpreter, "_patch_lang", once),
    ):
        yield
