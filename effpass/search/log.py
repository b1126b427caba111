"""The folder of a search: its settings and all results so far, from which an interrupted search is resumed.

search.json     settings, choices left out, predictions, trials, the chosen recipe
recipe.yaml     the best recipe so far
pareto.png      time or memory against quality loss, for all measured recipes
artifacts/      calibrated artifacts

The files are written atomically, so that the folder is usable whenever the process ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
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
OF_THE_MODEL = ("dtype", "weights")  # settings that are known only once it is loaded


@dataclass
class Log:
    """Contents of ``search.json``.

    Attributes:
        folder: folder of the search.
        settings: settings that the results depend on, as JSON types. A search can be resumed only with equal settings.
        left_out: passes, choices and recipes that are not searched → the reason.
        predicted: predictions for all legal recipes, by recipe key.
        trials: results of the recipes measured so far, by recipe key, in the order of measurement.
        chosen: key of the recipe in ``recipe.yaml``, and whether it was confirmed on text that was not used to choose.
        is_resumed: whether the search goes on from the files in the folder.
    """

    folder: Path
    settings: dict[str, Any]
    left_out: dict[str, str] = field(default_factory=dict)
    predicted: dict[str, Estimate] = field(default_factory=dict)
    trials: dict[str, Trial] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    is_resumed: bool = False

    @classmethod
    def open(cls, folder: Path, settings: dict[str, Any], *, resume: bool) -> Log:
        """Create the log of a new search, or read that of the search in `folder`.

        Args:
            folder: folder of the search.
            settings: settings that the results depend on.
            resume: read an existing log instead of creating one.

        Raises:
            EffpassError: without `resume`, `folder` exists and is not empty. With `resume`, it contains no search, or
                one with other settings.
        """
        settings = json.loads(json.dumps(settings))
        if not resume:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                is_search = (folder / _FILE).is_file()
                hint = "go on with --resume, or choose another folder" if is_search else "choose another folder"
                raise EffpassError(f"{folder} exists", hint=hint)
            return cls(folder, settings)
        found = cls._read(folder)
        found._compare(settings, settings.keys() | found.settings.keys() - set(OF_THE_MODEL))
        found.is_resumed = True
        return found

    def settle(self, settings: dict[str, Any]) -> None:
        """Add the settings :data:`OF_THE_MODEL`, or compare them in a resumed search.

        Raises:
            EffpassError: the search is resumed, and was one with other settings.
        """
        if self.is_resumed:
            self._compare(settings, settings)
        else:
            self.settings |= settings

    def _compare(self, settings: dict[str, Any], keys: Iterable[str]) -> None:
        changed = [
            f"{key} {self.settings.get(key)!r} -> {settings.get(key)!r}"
            for key in sorted(keys)
            if self.settings.get(key) != settings.get(key)
        ]
        if changed:
            raise EffpassError(
                f"this is not the search in {self.folder}: {'; '.join(changed)}",
                hint="go on with the old settings, or start anew in another folder",
            )

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
        """Write ``search.json`` atomically."""
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
