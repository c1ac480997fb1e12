"""Replicas of a model that share the windows."""

from __future__ import annotations

from dataclasses import dataclass

from short_gpt.importance import Importance


@dataclass(frozen=True)
class Team:
    rank: int = 0
    count: int = 1

    def sum(self, importance: Importance) -> Importance:
        return importance

    def any(self, flag: bool) -> bool:
        return flag


def current() -> Team:
    return Team()
