"""Every error kvthrift raises on purpose: one tree, one sentence each of cause, consequence and remedy.

Knows nothing of tensors, models or the command line; the command line turns any of these into exit code 2.

    KvthriftError
    |- RecipeError            a recipe that cannot be built or honoured
    |  |- UnknownNameError        no such method, part or option (the message lists the valid ones)
    |  |- OptionError             an option's value is out of range
    |  `- MissingSignalError      a part needs something this model or call cannot give
    |- BudgetError            a budget that cannot be met
    |- ContextError           a text that is empty, too short or too long
    |- ModelError             a model that cannot be loaded or compressed
    |  |- UnsupportedModelError   an architecture or layer kvthrift does not compress
    |  `- ModelMismatchError      a cache, save file or calibration made for another model
    |- MaskError              an attention mask that is neither causal nor padding
    |- CacheStateError        a cache that can no longer be trusted, or used out of order
    |- NoRoomError            memory for pages that could not be had
    |- SaveFileError          a saved cache that is damaged or not ours
    |- CalibrationError       an offline artefact that is missing or damaged
    |- DataError              evaluation data that is missing or malformed
    |- RunError               a run folder that is damaged, foreign or empty
    `- MissingPackageError    an optional package that is not installed
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class KvthriftError(Exception):
    """Base of every error kvthrift raises on purpose."""


class RecipeError(KvthriftError):
    """A recipe cannot be built or honoured."""


class UnknownNameError(RecipeError):
    """A name is not registered; the message lists those that are."""

    def __init__(self, kind: str, name: str, valid: Iterable[str]) -> None:
        known = sorted(valid)
        close = get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        super().__init__(f"unknown {kind} {name!r}.{hint} Valid: {', '.join(known)}.")


class OptionError(RecipeError):
    """An option's value is out of range or of the wrong type."""


class MissingSignalError(RecipeError):
    """A part needs a signal that this model or call cannot provide."""


class BudgetError(KvthriftError):
    """A budget is malformed or cannot be met."""


class ContextError(KvthriftError):
    """A text is empty, shorter than a method needs, or longer than the model reads."""


class ModelError(KvthriftError):
    """A model cannot be loaded or compressed."""


class UnsupportedModelError(ModelError):
    """An architecture, layer or attention implementation is not one that kvthrift compresses."""


class ModelMismatchError(ModelError):
    """A cache, save file or calibration belongs to another model."""


class MaskError(KvthriftError):
    """An attention mask is neither causal nor padding."""


class CacheStateError(KvthriftError):
    """A cache is used out of order, or after a forward pass failed half way."""


class NoRoomError(KvthriftError, MemoryError):
    """Memory for a layer's pages could not be had; pages and entries are as they were."""


class SaveFileError(KvthriftError):
    """A saved cache is damaged, incomplete or not one of ours."""


class CalibrationError(KvthriftError):
    """An offline artefact is missing, damaged or malformed."""


class DataError(KvthriftError):
    """Evaluation data is missing or malformed."""


class RunError(KvthriftError):
    """A run folder is damaged, belongs to another grid, or holds nothing."""


class MissingPackageError(KvthriftError):
    """A package that only some of what kvthrift does needs is not installed."""
