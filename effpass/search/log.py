"""The folder of a search: what it was asked, and all that it has found, whole at every moment.

search.json     settings, what was left out, predictions, trials, the choice
recipe.yaml     the best recipe so far
pareto.png      time or memory against loss, of all that was measured
artifacts/      what was calibrated
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from effpass.core.errors import EffpassError
from effpass.core.whole import write_text
from effpass.search.measure import Trial
from effpass.search.predict import Estimate

__all__ = ["ARTIFACTS", "Log"]

_FILE, ARTIFACTS = "search.json", "artifacts"
_SCHEMA = 1


@dataclass
class Log:
    """
    Attributes:
        folder: of the search.
        settings: what results rest on; another search has others.
        left_out: passes and choices that the search does not go through, with reasons.
        predicted: of every legal recipe, by its key.
        trials: of recipes, by their keys, in the order they were measured.
        chosen: key of the recipe in `recipe.yaml`, and whether it held on text that nobody has chosen by.
    """

    folder: Path
    settings: dict[str, Any]
    left_out: dict[str, str] = field(default_factory=dict)
    predicted: dict[str, Estimate] = field(default_factory=dict)
    trials: dict[str, Trial] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, settings: dict[str, Any], *, resume: bool) -> Log:
        """A new search's log, or that of the search in `folder`.

        Raises:
            EffpassError: `folder` is taken, holds no search, or one with other settings.
        """
        settings = json.loads(json.dumps(settings))
        if not resume:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                is_search = (folder / _FILE).is_file()
                hint = "go on with --resume, or choose another folder" if is_search else "choose another folder"
                raise EffpassError(f"{folder} exists", hint=hint)
            return cls(folder, settings)
        found = cls._read(folder)
        changed = [
            f"{key} {found.settings.get(key)!r} -> {settings.get(key)!r}"
            for key in sorted(settings.keys() | found.settings.keys())
            if settings.get(key) != found.settings.get(key)
        ]
        if changed:
            raise EffpassError(
                f"this is not the search in {folder}: {'; '.join(changed)}",
                hint="go on with the old settings, or start anew in another folder",
            )
        return found

    @classmethod
    def _read(cls, folder: Path) -> Log:
        file = folder / _FILE
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if data["schema"] != _SCHEMA:
                raise EffpassError(f"{file}: schema {data['schema']!r}, and this effpass reads {_SCHEMA}")
            return cls(
                folder, data["settings"], data["left_out"],
                {key: Estimate(**value) for key, value in data["predicted"].items()},
                {key: Trial(**value) for key, value in data["trials"].items()}, data["chosen"],
            )  # fmt: skip
        except OSError as error:
            raise EffpassError(f"{folder} holds no search to go on with", hint="leave out --resume") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EffpassError(f"{file} can't be read: {error}", hint="start anew in another folder") from error

    def save(self) -> None:
        """Write it, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        data = {
            "schema": _SCHEMA,
            "settings": self.settings,
            "left_out": self.left_out,
            "predicted": {key: asdict(value) for key, value in self.predicted.items()},
            "trials": {key: trial.to_json() for key, trial in self.trials.items()},
            "chosen": self.chosen,
        }
        write_text(self.folder / _FILE, json.dumps(data, indent=1))
