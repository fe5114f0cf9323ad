"""Settings come from BANQUET_* variables, and a misspelt one is an error, not a default."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from core.errors import InvalidSetting
from core.settings import Settings, load_settings


def test_the_environment_is_read_and_the_rest_keeps_its_default() -> None:
    settings = load_settings({"BANQUET_MAX_ENTITIES": "7", "PATH": "/bin", "BANQUET_STATE_DIR": "/x"})
    assert settings.max_entities == 7
    assert settings.state_dir == Path("/x")
    assert settings.models_url == "/x/models"
    assert load_settings({"BANQUET_REGISTRY_URL": "s3://b/m"}).models_url == "s3://b/m"


def test_an_unknown_variable_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(InvalidSetting, match="BANQUET_MAX_ENTITES") as caught:
        load_settings({"BANQUET_MAX_ENTITES": "7"})
    assert "BANQUET_MAX_ENTITIES" in str(caught.value.hint)


@pytest.mark.parametrize("value", ["0", "-1", "many", ""])
def test_a_value_out_of_range_names_its_variable(value: str) -> None:
    with pytest.raises(InvalidSetting, match="BANQUET_MAX_ENTITIES is not valid"):
        load_settings({"BANQUET_MAX_ENTITIES": value})


def test_settings_are_frozen_and_every_one_is_described() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.max_entities = 3
    assert all(field.description for field in Settings.model_fields.values() if field.annotation is not str)
