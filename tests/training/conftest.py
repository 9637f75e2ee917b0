"""A tiny model, read once."""

import pytest

from tests.tiny import Base, tiny_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A model with an untied head, read."""
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")
