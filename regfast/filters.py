"""The taps of a blur."""

from ._core.taps import binomial

__all__ = ["binomial"]
