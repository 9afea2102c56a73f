import pytest

from gptjax.config import load_config
from gptjax.errors import UserError


@pytest.fixture(scope="session")
def write():
    def write(folder, name, text):
        path = folder / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def complaint():
    """What `load_config` says of arguments that it refuses."""

    def complaint(*args):
        with pytest.raises(UserError) as caught:
            load_config(*args)
        return str(caught.value)

    return complaint
