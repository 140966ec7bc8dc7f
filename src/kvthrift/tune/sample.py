"""Search with optuna: the tree-structured Parzen estimator, for one value or for two that are traded.

Knows a space and what a place in it is worth; nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvthrift.errors import MissingPackageError
from kvthrift.tune.options import Dim
from kvthrift.tune.space import Space, Values

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Worth = tuple[float, ...]


def sample(
    space: Space, evaluate: Callable[[Values], Worth | None], *, trials: int, values: int, seed: int = 0
) -> None:
    """Try so many places, the space's start first.

    Args:
        evaluate: what a place is worth, each larger is better; None where that is not known.
        trials: how many.
        values: how many numbers ``evaluate`` gives.
        seed: makes the search repeatable.

    Raises:
        MissingPackageError: optuna is not installed.
    """
    check_optuna()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        directions=["maximize"] * values,
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(5, trials // 5)),
    )
    dims = {dim.name: _distribution(dim) for dim in space.dims}
    study.enqueue_trial(space.start)
    for _ in range(trials):
        trial = study.ask(dims)
        worth = evaluate({name: trial.params[name] for name in dims})
        if worth is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, list(worth))


def check_optuna() -> None:
    """Refuse to begin without optuna.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise MissingPackageError(
            "the engine 'optuna' needs the package optuna, which is not installed. Install it: "
            "pip install 'kvthrift[tune]'"
        ) from None


def _distribution(dim: Dim) -> BaseDistribution:
    from optuna.distributions import FloatDistribution, IntDistribution

    if dim.whole:
        return IntDistribution(int(dim.low), int(dim.high), log=dim.log)
    return FloatDistribution(dim.low, dim.high, log=dim.log)
