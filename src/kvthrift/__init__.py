"""kvthrift: spend a KV-cache budget well.

Importing it registers the attention implementation "kvthrift" with transformers, and does nothing else.
"""

from kvthrift.budget import Budget
from kvthrift.core import AttentionOutput, LayerView, Signals
from kvthrift.errors import (
    BudgetError,
    CacheStateError,
    CalibrationError,
    ContextError,
    DataError,
    KvthriftError,
    MaskError,
    MissingPackageError,
    MissingSignalError,
    ModelError,
    ModelMismatchError,
    OptionError,
    RecipeError,
    RunError,
    SaveFileError,
    UnknownNameError,
    UnsupportedModelError,
)
from kvthrift.integrations.transformers.attention import register as _register
from kvthrift.integrations.transformers.cache import Cache
from kvthrift.integrations.transformers.generate import generate
from kvthrift.integrations.transformers.prefill import prefill
from kvthrift.integrations.transformers.save import load
from kvthrift.methods import Method, method, methods
from kvthrift.recipe import Protect, Recipe, Trigger
from kvthrift.runtime import CacheReport, LayerReport

__version__ = "0.1.0"

_register()

__all__ = [
    "AttentionOutput",
    "Budget",
    "BudgetError",
    "Cache",
    "CacheReport",
    "CacheStateError",
    "CalibrationError",
    "ContextError",
    "DataError",
    "KvthriftError",
    "LayerReport",
    "LayerView",
    "MaskError",
    "Method",
    "MissingPackageError",
    "MissingSignalError",
    "ModelError",
    "ModelMismatchError",
    "OptionError",
    "Protect",
    "Recipe",
    "RecipeError",
    "RunError",
    "SaveFileError",
    "Signals",
    "Trigger",
    "UnknownNameError",
    "UnsupportedModelError",
    "__version__",
    "generate",
    "load",
    "method",
    "methods",
    "prefill",
]
