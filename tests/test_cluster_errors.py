"""What is told from the errors of Ray's calls."""

from collections.abc import Iterator
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from merge_ray.cluster import errors

UNAVAILABLE = ActorUnavailableError("its connection broke", None)


class Actor:
    """An actor that answers so, one call after the other."""

    def __init__(self, *answers: Exception | None) -> None:
        self.answers: Iterator[Exception | None] = iter(answers)
        self.__ray_ready__ = self

    def remote(self) -> Exception | None:
        return next(self.answers)


def get(answer: Exception | None, timeout: float) -> None:
    if answer is not None:
        raise answer


@pytest.mark.parametrize(
    ("answers", "lost"),
    [
        ([None], False),
        ([UNAVAILABLE, UNAVAILABLE, None], False),
        ([UNAVAILABLE, ActorDiedError()], True),
        ([GetTimeoutError()], False),
    ],
)
def test_a_host_whose_process_was_killed_is_lost_if_it_does_not_return(
    answers: list[Any], lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors.ray, "get", get)
    monkeypatch.setattr(errors.time, "sleep", lambda seconds: None)
    assert errors.is_lost(UNAVAILABLE, Actor(None), Actor(*answers)) is lost
    assert errors.is_lost(ActorDiedError(), Actor())
