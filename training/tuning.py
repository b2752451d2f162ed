"""Settings of boosted trees, looked for by Optuna on the tuning cut alone; a seeded sampler makes the search repeatable."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from features.state.ports import MissingStateError

if TYPE_CHECKING:
    from training.run import TrackedRun

Settings = Mapping[str, float]
"""Of LightGBM, by its own names; ``trees`` is the number of rounds."""
Space = Callable[[Any], Settings]
"""Asks a trial of Optuna for settings."""


def of_probabilities(trial: Any) -> Settings:
    """Small, strongly regularised trees: what some thousand rows can teach."""
    return {
        "trees": trial.suggest_int("trees", 80, 500, log=True),
        "num_leaves": trial.suggest_int("num_leaves", 3, 24, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 0.01, 0.08, log=True),
        "min_data_in_leaf": trial.suggest_int("min_data_in_leaf", 20, 200, log=True),
        "lambda_l2": trial.suggest_float("lambda_l2", 0.3, 100.0, log=True),
        "feature_fraction": trial.suggest_float("feature_fraction", 0.3, 1.0),
        "bagging_fraction": trial.suggest_float("bagging_fraction", 0.5, 1.0),
    }


def of_rankers(trial: Any) -> Settings:
    """Larger trees: a ranker learns from some hundred thousand candidates."""
    return {
        "trees": trial.suggest_int("trees", 30, 150, log=True),
        "num_leaves": trial.suggest_int("num_leaves", 6, 48, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 0.03, 0.2, log=True),
        "lambda_l2": trial.suggest_float("lambda_l2", 0.0, 20.0),
        "feature_fraction": trial.suggest_float("feature_fraction", 0.4, 1.0),
        "bagging_fraction": trial.suggest_float("bagging_fraction", 0.4, 1.0),
    }


def check_optuna() -> None:
    """See that Optuna is there.

    Raises:
        MissingStateError: it is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        raise MissingStateError("Optuna is not installed: pip install 'ubiquo[evaluate]', or leave --trials out")


def tuned(
    run: TrackedRun, name: str, space: Space, defaults: Settings, metric: str, score: Callable[[Settings], float], trials: int, seed: int
) -> dict[str, float]:
    """The settings with the best score out of *trials*, of which the first are the *defaults*; none where these are the best.

    Args:
        run: keeps each trial as a nested run.
        name: of what is tuned.
        metric: what the score is.
        score: of a model with these settings on the tuning cut; higher is better.

    Raises:
        MissingStateError: Optuna is not installed.
    """
    check_optuna()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial(dict(defaults))

    def objective(trial: Any) -> float:
        settings = space(trial)
        return run.trial(f"{name} trial {trial.number}", settings, metric, score(settings))

    study.optimize(objective, n_trials=trials)
    return {} if study.best_trial.number == 0 else {key: float(value) for key, value in study.best_params.items()}


def tuning_note(name: str, settings: Settings, trials: int) -> str:
    """What a tuning chose, as a sentence of the report."""
    told = ", ".join(f"{key} {value:.3g}" for key, value in settings.items()) or "the settings that they come with were the best"
    return f"Trees of {name}, chosen by {trials} trials on an earlier cut: {told}."
