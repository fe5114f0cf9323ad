"""The error tree: drawn as it is, with stable codes and messages of its own."""

from __future__ import annotations

import re

import pytest

from core import errors
from serving.failures import FailureLog
from serving.problems import STATUS, problem, status_of


def tree(cls: type[BaseException]) -> set[type[BaseException]]:
    return {cls}.union(*(tree(sub) for sub in cls.__subclasses__() if sub.__module__ == "core.errors"))


def test_the_drawing_shows_every_class_and_no_other() -> None:
    drawn = set(re.findall(r"^[│ ]*[├└]── (\w+)", errors.__doc__ or "", re.MULTILINE)) | {"BanquetError"}
    assert drawn == {cls.__name__ for cls in tree(errors.BanquetError)}


def test_codes_are_unique_and_follow_from_the_names() -> None:
    classes = tree(errors.BanquetError) - {errors.BanquetError}
    codes = {cls.code for cls in classes}  # type: ignore[attr-defined]
    assert len(codes) == len(classes)
    assert errors.RedisUnavailable.code == "redis_unavailable"
    assert errors.TooLarge.code == "too_large"


@pytest.mark.parametrize("cls", sorted(tree(errors.BanquetError), key=lambda c: c.__name__))
def test_every_error_has_a_default_message_and_a_status(cls: type[errors.BanquetError]) -> None:
    error = cls()
    assert str(error).endswith(".")
    assert 400 <= status_of(error) <= 503
    assert status_of(error) in (409, 503) or not error.retryable


def test_the_nearest_class_decides_the_status() -> None:
    assert status_of(errors.TooLarge()) == 422
    assert status_of(errors.ModelNotFound()) == 404
    assert status_of(errors.RedisUnavailable()) == 503
    assert status_of(errors.BanquetError()) == 500
    assert set(STATUS.values()) == {400, 401, 403, 404, 405, 409, 413, 415, 422, 500, 503}


def test_an_unexpected_exception_leaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    status, body = problem(RuntimeError("password=hunter2"), "id-1", FailureLog())
    assert status == 500
    assert b"hunter2" not in body
    assert b"id-1" in body
    assert "hunter2" in caplog.text
