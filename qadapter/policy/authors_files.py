"""What the authors' published code leaves beside its adapters.

Their trainer saves a plain PEFT LoRA, whose stream is Q itself, and ``training_config.json`` with
every argument of the run: in the output folder, and not in the ``checkpoint-…`` folders inside.
"""

from __future__ import annotations

import dataclasses
import re

from qadapter.errors import QAdapterError
from qadapter.objective import ObjectiveConfig
from qadapter.policy.adapter_files import AdapterFiles
from qadapter.system.documents import MAX_CONFIG_BYTES, read_json

TRAINING_CONFIG_NAME = "training_config.json"
_NUMBERS = {"alpha_0": "alpha_0", "alpha_tilde": "alpha_tilde", "gamma": "gamma",
            "beta": "chi2_coef"}
"""Theirs → ours."""
_IN_A_RUN = re.compile(r"checkpoint-\d+")


def authors_objective(files: AdapterFiles) -> ObjectiveConfig | None:
    """The objective of an adapter that the authors' code trained; None where nothing says so.

    Their trainers of SFT, DPO and reward models write such a file too, without the two alphas.

    Raises:
        QAdapterError: the file is damaged, or a number in it is none.
    """
    places = [files, *([files.above()] if _IN_A_RUN.fullmatch(files.path.name) else [])]
    place = next((place for place in places if place.has(TRAINING_CONFIG_NAME)), None)
    if place is None:
        return None
    path = place.locate(TRAINING_CONFIG_NAME)
    arguments = read_json(path, most=MAX_CONFIG_BYTES)
    if not isinstance(arguments, dict) or not {"alpha_0", "alpha_tilde"} <= arguments.keys():
        return None
    given = {ours: arguments[theirs] for theirs, ours in _NUMBERS.items() if theirs in arguments}
    try:
        return dataclasses.replace(ObjectiveConfig.authors(), **given)
    except ValueError as error:
        raise QAdapterError(f"{path}: {error}") from error
