"""A whole search, from a model and texts to a recipe.

``effpass optimize`` creates a :class:`Search` and calls :meth:`~Search.begin`, :meth:`~Search.run` and
:meth:`~Search.confirm`. Every result is saved at once in the folder of the search (:mod:`effpass.search.log`), from
which an interrupted search is resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from effpass.core.errors import EffpassError
from effpass.search.calibrated import Calibrator
from effpass.search.choices import Choice, choices
from effpass.search.explore import best, holding, next_candidate, quality_loss
from effpass.search.log import ARTIFACTS, Log
from effpass.search.measure import Trial, losses_of, prepared, try_out
from effpass.search.plot import can_plot, plot
from effpass.search.predict import Estimate, Traced, trace
from effpass.search.recipes import DENSE, Candidate, legal_recipes
from effpass.search.texts import Texts
from effpass.search.workload import Goal, Workload

__all__ = ["RECIPE", "Search"]

RECIPE, _PICTURE = "recipe.yaml", "pareto.png"


@dataclass
class Search:
    """The state of a search.

    Attributes:
        log: log in the folder of the search.
        load: returns the model without any pass; called anew for every recipe.
        texts: token ids of the calibration, selection and confirmation texts.
        goal: quantity to minimize.
        limit: largest relative increase of the perplexity.
        workload: sizes of the requests that are measured.
        most: maximum number of passes in a recipe.
        given: choices with artifacts provided by the user.
        name: name of the calibration text.
        say: called with one line of progress at a time.
        candidates: all legal recipes; set by :meth:`begin`.
        predicted: prediction of the cost model for each recipe; set by :meth:`begin`.
        trials: results of the recipes measured so far.
    """

    log: Log
    load: Callable[[], Any]
    texts: Texts
    goal: Goal
    limit: float
    workload: Workload
    most: int = 3
    given: Sequence[Choice] = ()
    name: str = "text"
    say: Callable[[str], None] = print
    candidates: list[Candidate] = field(default_factory=list)
    predicted: dict[Candidate, Estimate] = field(default_factory=dict)
    trials: dict[Candidate, Trial] = field(default_factory=dict)

    def begin(self) -> None:
        """Find the legal recipes, calibrating artifacts where needed, and predict each with the cost model.

        Raises:
            EffpassError: the model can't be loaded, run, or counted by the cost model.
        """
        self.log.save()
        calibrator = Calibrator(
            self.log.folder / ARTIFACTS, self.load, self.texts.calibration, self.workload, self.name, self.say
        )
        _check_length(calibrator.model, self.workload)
        wanted, left_out = choices(calibrator.model, self.goal, self.workload, self.given)
        usable, refused = calibrator.usable(wanted)
        for choice in self.given:
            if choice.label in refused:
                raise EffpassError(f"{choice.label}: {refused[choice.label]}", hint="leave this --artifact out")
        left_out |= refused
        calibrator.release()
        self.candidates = legal_recipes(usable, self.most)
        by_key = {candidate.key: candidate for candidate in self.candidates}
        untraced = {key: why for key, why in self.log.left_out.items() if key in by_key}
        if set(self.log.predicted) | set(untraced) != set(by_key):
            untraced = self._predict()
            self.log.predicted = {candidate.key: of for candidate, of in self.predicted.items()}
        self.log.left_out = left_out | untraced
        self.candidates = [candidate for candidate in self.candidates if candidate.key in self.log.predicted]
        self.predicted = {by_key[key]: of for key, of in self.log.predicted.items()}
        self.trials = {by_key[key]: trial for key, trial in self.log.trials.items() if key in by_key}
        self.log.save()

    def _predict(self) -> dict[str, str]:
        """Predict every candidate; returns those that can't be traced, with the reason."""
        traced: dict[Candidate, Traced | str] = {}
        untraced: dict[str, str] = {}
        self.say(f"predicting {len(self.candidates)} legal recipes")
        for candidate in self.candidates:
            weights = candidate.weights
            if weights not in traced:
                try:
                    traced[weights] = trace(prepared(self.load, weights), self.workload)
                except EffpassError as error:
                    if weights == DENSE:
                        raise
                    traced[weights] = error.message
            found = traced[weights]
            if isinstance(found, str):
                untraced[candidate.key] = found
            else:
                self.predicted[candidate] = found.with_passes(candidate.recipe.build()[len(weights.choices) :])
        return untraced

    # -- measuring ----------------------------------------------------------------------------------------------------

    def run(self, most_trials: int | None = None) -> bool:
        """Measure one promising recipe after another.

        Args:
            most_trials: maximum number of recipes to measure in this call; None for no limit.

        Returns:
            Whether the search has ended, i.e. no recipe is left that promises an improvement.
        """
        count = 0
        while (candidate := self.next()) is not None:
            if count == most_trials:
                return False
            self.measure(candidate)
            count += 1
        return True

    def next(self) -> Candidate | None:
        return next_candidate(self.candidates, self.predicted, self.trials, self.goal, self.limit)

    def measure(self, candidate: Candidate) -> Trial:
        """Measure one recipe and save its result, and the best recipe so far, in the folder."""
        trial = try_out(self.load, candidate, self.texts.selection, self.workload)
        if candidate == DENSE and not trial.is_measured:
            raise EffpassError(f"the model as it is can't be measured: {trial.reason}")
        self.trials[candidate] = self.log.trials[candidate.key] = trial
        self.say(f"{len(self.trials)}: {self._told(candidate)}")
        self._keep(best(self.trials, self.goal, self.limit), confirmed=False)
        return trial

    def confirm(self) -> Candidate:
        """The best recipe whose quality loss is within the limit on the confirmation text as well; it is saved."""
        self._confirmed(DENSE)
        among = holding(self.trials, self.limit)
        while (chosen := best(self.trials, self.goal, self.limit, among)) != DENSE:
            self._confirmed(chosen)
            loss = quality_loss(self.trials, chosen, confirmed=True)
            self.say(f"{chosen.key}: {100 * loss:+.2f} % on text that nobody has chosen by")
            if loss <= self.limit:
                break
            among.remove(chosen)
        self._keep(chosen, confirmed=True)
        return chosen

    def _confirmed(self, candidate: Candidate) -> None:
        trial = self.trials[candidate]
        if not trial.confirmed:
            trial.confirmed = losses_of(prepared(self.load, candidate), self.texts.confirmation, self.workload)
            self.log.save()

    def _keep(self, chosen: Candidate, *, confirmed: bool) -> None:
        """Save `chosen` as the recipe of the folder."""
        self.log.chosen = {"recipe": chosen.key, "confirmed": confirmed}
        chosen.recipe.save(self.log.folder / RECIPE)
        self.log.save()

    def picture(self) -> None:
        """Plot the measured recipes, if matplotlib is installed."""
        if self.trials and can_plot():
            chosen = next(c for c in self.trials if c.key == self.log.chosen["recipe"])
            plot(self.trials, self.goal, self.limit, chosen, self.log.folder / _PICTURE)

    def _told(self, candidate: Candidate) -> str:
        trial = self.trials[candidate]
        if not trial.is_measured:
            return f"{candidate.key}: {trial.status}: {trial.reason}"
        perplexity = math.exp(mean(trial.losses))
        held = (trial.weight_bytes + trial.cache_bytes) / 1e6
        return (
            f"{candidate.key}: {1e3 * trial.step_seconds:.1f} ms a step, {trial.tokens_per_second:.1f} tokens/s,"
            f" {held:.1f} MB, perplexity {perplexity:.3f} ({100 * quality_loss(self.trials, candidate):+.2f} %)"
        )


def _check_length(model: Any, workload: Workload) -> None:
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is not None and workload.length > most:
        raise EffpassError(
            f"prompts of {workload.prompt} tokens and {workload.new_tokens} behind them, and the model has {most}"
            " positions",
            hint="give shorter prompts: --prompt",
        )
