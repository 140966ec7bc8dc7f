"""A model for lm-evaluation-harness whose cache is compressed: the tasks of that harness, under any recipe.

The harness finds models that were registered before it starts, and has no way to name them on its own command line, so

    python -m kvthrift.integrations.lm_eval --model kvthrift --model_args method=snapkv,budget=512 --tasks ...

is its command with this model added. In Python, call :func:`register`, then ``lm_eval.simple_evaluate(model=NAME)``.
Needs ``pip install 'kvthrift[lm-eval]'``; importing this module does nothing.
"""

from __future__ import annotations

from importlib.util import find_spec

from kvthrift.errors import RunError

NAME = "kvthrift"


def register() -> None:
    """Make the harness know the model "kvthrift".

    Raises:
        RunError: the harness is not installed.
    """
    if find_spec("lm_eval") is None:
        raise RunError(
            "lm-evaluation-harness is not installed, so its tasks cannot run. pip install 'kvthrift[lm-eval]'."
        )
    import lm_eval.models  # noqa: F401  # the harness looks for its own models only in an empty registry
    from lm_eval.api.registry import MODEL_REGISTRY, register_model

    from kvthrift.integrations.lm_eval.model import CompressedLM

    if NAME not in MODEL_REGISTRY:
        register_model(NAME)(CompressedLM)
