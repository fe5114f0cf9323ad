"""Settings come from BANQUET_* variables, and a misspelt one is an error, not a default."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from core.errors import InvalidSetting
from core.settings import PREFIX, Settings, load_settings

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


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


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings().max_entities = 3


def test_the_page_lists_every_setting_once_with_its_default_and_meaning() -> None:
    rows = re.findall(
        r"^\| `(BANQUET_\w+)` \| (.+?) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    expected = {
        (PREFIX + name.upper(), _shown(field.default), field.description)
        for name, field in Settings.model_fields.items()
    }
    assert len(rows) == len(expected)
    assert set(rows) == expected


def _shown(default: object) -> str:
    """As the page writes it."""
    if default is None:
        return "none"
    text = default.get_secret_value() if isinstance(default, SecretStr) else str(default)
    return f"`{text.lower() if isinstance(default, bool) else text}`" if text else "empty"
