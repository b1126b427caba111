"""User-defined reward functions for GRPO, loaded by name and checked."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from effpass.core.errors import EffpassError, did_you_mean

__all__ = ["load_reward"]

Reward = Callable[..., list[float]]


def load_reward(name: str) -> Reward:
    """Return the reward function ``module:function``; modules in the working directory are found as well.

    The function is called as ``f(prompts=…, completions=…, FIELD=…)`` with a list for each of its parameters: the
    prompts, the sampled completions (texts, or lists of messages for conversations), and any field of the data. It
    returns one number per completion.

    Returns:
        The function in the form that TRL calls. It drops arguments that the user's function does not have, and raises
        an :class:`EffpassError` if the rewards are not finite or their number is not that of the completions.

    Raises:
        EffpassError: if the module or the function does not exist.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise EffpassError(f"--reward: got {name!r}", hint="module:function, such as my_rewards:exact_answer")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's own code runs while it is imported
        raise EffpassError(
            f"--reward {name}: {module_name} can't be imported: {type(error).__name__}: {error}",
            hint=f"a module of the environment, or a file {module_name}.py in {here}",
        ) from error
    finally:
        sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        raise EffpassError(
            f"--reward: {module_name} has no function {function_name!r}{did_you_mean(function_name, known)}"
        )
    return _checked(function, name)


def _checked(function: Callable[..., Any], name: str) -> Reward:
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())

    def reward(prompts: list[Any], completions: list[Any], **fields: Any) -> list[float]:
        given = {"prompts": prompts, "completions": completions, **fields}
        wanted = [n for n, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        missing = [n for n in wanted if n not in given and parameters[n].kind is not inspect.Parameter.VAR_POSITIONAL]
        if missing:
            raise EffpassError(
                f"reward {name} takes {missing[0]!r}, which is no field of the data",
                hint=f"fields: {', '.join(sorted(set(given) - _TRL))}",
            )
        try:
            values = function(**{n: v for n, v in given.items() if takes_all or n in parameters})
        except Exception as error:  # the user's own code
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise EffpassError(
                f"reward {name} failed: {type(error).__name__}: {error}", hint=f"{place.filename}:{place.lineno}"
            ) from error
        try:
            found = [float(value) for value in values]
        except (TypeError, ValueError) as error:
            raise EffpassError(
                f"reward {name} returned {values!r:.80}, expected a number for each completion"
            ) from error
        if len(found) != len(completions):
            raise EffpassError(f"reward {name} returned {len(found)} numbers for {len(completions)} completions")
        for i, value in enumerate(found):
            if not math.isfinite(value):
                raise EffpassError(
                    f"reward {name} is {value} for the completion {completions[i]!r:.120}",
                    hint="return a finite number for every completion, 0 for one that can't be judged",
                )
        return found

    reward.__name__ = name.rpartition(":")[2]
    return reward


# Arguments that TRL passes in addition to the fields of the data.
_TRL = {"completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
