"""Reads results that were written with the names of version 0.2 under today's keys: one table old -> new."""

from __future__ import annotations

import dataclasses
from typing import Any

from slimsam_jax.compression.old_names import GONE, renamed
from slimsam_jax.compression.set_option import change
from slimsam_jax.compression.steps import Prune

ORDERS = {  # (recipe, its settings that only said in which order things happen) -> the list of steps that it is
    ("default", ("alternate=true",)): "alternating",
    ("default", ("alternate=true", "rounds=2")): "progressive",
    ("default", ("polish=0.25",)): "polish",
    ("default", ("polish=0.25", "tune_decoder=true")): "decoder",
    ("taylor", ("alternate=false",)): "one_shot",
    ("taylor", ("alternate=false", "scratch=true")): "scratch",
}


def slimming_key(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns an entry of slimming.jsonl with "recipe" and "set" as today's rows have them."""
    if "set" not in entry:
        return entry  # the teacher itself
    order = tuple(setting for setting in entry["set"] if setting.partition("=")[0] in GONE)
    kept = [renamed(setting) for setting in entry["set"] if setting not in order]
    recipe = ORDERS[entry["recipe"], order] if order else entry["recipe"]
    return {**entry, "recipe": recipe, "set": kept}


def pruning_key(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns an entry of pruning.jsonl with "recipe" as `prune_choices` gives it."""
    if "head_channels" in entry["recipe"]:
        return entry
    projects = entry["recipe"]["criterion"] == "projection"
    unread = {*GONE, "signal" if projects else "weighting"}  # two choices of old are one today
    settings = {}
    for name, value in entry["recipe"].items():
        if name not in unread:
            field, _, text = renamed(f"{name}={str(value).lower() if isinstance(value, bool) else value}").partition(
                "="
            )
            if settings.get(field) != "whole" and settings.get(field) != "separate":
                settings[field] = text
    (step,) = change((Prune("embedding"),), [f"{name}={value}" for name, value in settings.items()])
    return {**entry, "recipe": prune_choices(step)}


def prune_choices(step: Prune) -> dict[str, Any]:
    """Returns the choices of a step that prunes, whatever its part: the key of its results."""
    choices = dataclasses.asdict(step)
    del choices["part"], choices["ratio"], choices["quirks"]["self_aligned_global"]
    return choices
