"""Messages of errors: of long ones the beginning and the end are told, and how much is not."""

from __future__ import annotations

from copyspec_engine import ConfigError, RequestFailedError
from copyspec_engine.serve.errors import ApiError, api_error


def test_what_was_shortened_is_not_cut_again_where_another_error_tells_of_it() -> None:
    told = str(ConfigError(f"Got {'a' * 100_000} but expected less: shorten it"))
    assert told.startswith("Got aaa")
    assert told.endswith("shorten it")
    assert "... (92234 characters) ..." in told
    assert api_error(ConfigError(told)).message == told
    assert str(ApiError(400, "invalid_value", told)) == told
    wrapped = f"The request failed with ConfigError: {told}"
    assert str(RequestFailedError(wrapped)) == wrapped


def test_a_message_of_some_length_is_told_whole() -> None:
    assert str(ConfigError("a" * 8000)) == "a" * 8000
