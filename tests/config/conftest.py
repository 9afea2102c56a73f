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
    """complaint(*args) -> the error text of `load_config(*args)`."""

    def complaint(*args):
        with pytest.raises(UserError) as caught:
            load_config(*args)
        return str(caught.value)

    return complaint
