"""Settings: from the environment, with what a command was told on top; what cannot be is said in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from sdfserver.errors import ConfigError
from sdfserver.server.settings import Settings, load_settings


def test_the_environment_sets_them_and_an_option_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDFSERVER_PORT", "9000")
    monkeypatch.setenv("SDFSERVER_MAX_QUEUE", "7")
    monkeypatch.setenv("SDFSERVER_ALLOW_PUBLIC_WITHOUT_KEYS", "1")
    settings = load_settings(port=9001, host=None)
    assert (settings.port, settings.host, settings.max_queue) == (9001, "127.0.0.1", 7)
    assert settings.allow_public_without_keys


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PORT", "eighty", "port is 'eighty'"),
        ("PORT", "70000", "port is '70000'"),
        ("MAX_QUEUE", "0", "max_queue is '0'"),
        ("MAX_CHILD_BYTES", "1", "max_child_bytes is '1'"),
        ("LEASE_SECONDS", "1", "three beats of 0.5"),
    ],
)
def test_what_cannot_be_is_said_with_its_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(f"SDFSERVER_{name}", value)
    with pytest.raises(ConfigError, match=said):
        load_settings()


def test_the_database_is_a_file_in_the_folder_unless_told(tmp_path: Path) -> None:
    assert Settings(data_dir=tmp_path).database == f"sqlite:///{tmp_path}/sdfserver.sqlite3"
    for given in ("postgres://u@h/d", "postgresql://u@h/d", "postgresql+psycopg://u@h/d"):
        assert Settings(database_url=given).database == "postgresql+psycopg://u@h/d"


def test_help_lists_every_setting_with_its_default() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "sdfserver", "serve", "--help"],
        capture_output=True, text=True, check=True, env={"COLUMNS": "200", "PATH": ""},
    ).stdout  # fmt: skip
    for name, field in Settings.model_fields.items():
        assert f"SDFSERVER_{name.upper()}" in shown
        assert field.description is not None
        assert field.description.split()[0] in shown
