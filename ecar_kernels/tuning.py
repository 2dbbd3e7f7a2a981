"""Launch settings: the measured ones of this device where there are any, else the usual ones."""

from typing import TypeVar

Settings = TypeVar("Settings")


def choose(op: str, key: tuple, rows: int, usual: Settings, arch: int) -> Settings:
    """The settings for `rows` rows of a problem `key` of `op`; `usual` where none was measured."""
    return usual
