"""How large a share of the customers each variant is meant to have: as told, or as the home's policy says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

CONTROL_GROUP = "control-group"
"""The name by which the control group is asked for as if it were an experiment."""
CONTROL, TREATED = "control", "treated"
POLICY_FILE = "policy.yaml"


def told_shares(text: str) -> dict[str, float]:
    """Read ``A=0.5,B=0.5``: shares above 0, in any unit.

    Raises:
        ValueError: the text has another form.
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (each.strip() for each in part.rpartition("="))
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not name or not equals or name in shares or not 0 < share < math.inf:
            raise ValueError(f"--ratio {text}: {part.strip() or 'nothing'} is no share: write A=0.5,B=0.5, each variant once and above 0")
        shares[name] = share
    return shares


def policy_shares(path: Path, name: str) -> dict[str, float] | None:
    """The shares of experiment *name*, or of the control group, in a policy file; None where it names none.

    Raises:
        ValueError: the file is no YAML, or not of a policy's shape; a service would not start on it either.
    """
    try:
        policy = yaml.safe_load(path.read_bytes()) or {}
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: not valid YAML: {' '.join(str(error).split())}") from None
    try:
        return _control_group(policy) if name == CONTROL_GROUP else _experiment(policy, name)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path.name}: the shares of {name} cannot be read: mend it (docs/policy.md), or give --ratio") from None


def _control_group(policy: Any) -> dict[str, float] | None:
    group = policy.get("control_group")
    return None if group is None else {CONTROL: float(group["share"]), TREATED: 1.0 - float(group["share"])}


def _experiment(policy: Any, name: str) -> dict[str, float] | None:
    found = [each for each in policy.get("experiments") or () if each["name"] == name]
    return {each["name"]: float(each["share"]) for each in found[0]["variants"]} if found else None
