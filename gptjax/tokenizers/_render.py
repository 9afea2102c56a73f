"""Renders one Jinja template, inside limits: the program that `chat.py` starts for a template it did not write.

    python -I _render.py FOLDERS..  < request  > "ready", then {"text": ..} or {"error": ..}

It imports nothing but jinja2 (found in FOLDERS) and the standard library, so that it starts quickly. Jinja's sandbox
keeps a template from Python's inside, but not from endless loops and giant strings: these end at the limits that this
process sets for itself, at the latest when its parent kills it.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from contextlib import suppress
from datetime import datetime
from typing import Any

MEMORY_BYTES = 512 << 20
READY = b"ready\n"


def render(template: str, context: dict[str, Any], max_chars: int) -> str:
    """The text of a template, in the environment that transformers gives to chat templates.

    Raises:
        Exception: whatever Jinja or the template raises; ValueError for more than max_chars.
    """
    pieces, size = [], 0
    for piece in _compiled(template).generate(**context):
        size += len(piece)
        if size > max_chars:
            raise ValueError(f"more than {max_chars:,} characters come out")
        pieces.append(piece)
    return "".join(pieces)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


def _environment() -> Any:
    import jinja2.ext
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(jinja2.ext.Extension):
        """`{% generation %}..{% endgeneration %}` marks what the model says; the text is that inside."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class PublicNamespace(Namespace):
        def __init__(*args: Any, **attributes: Any) -> None:  # `self` may be an attribute's name
            self, *rest = args
            Namespace.__init__(self)
            for name, value in dict(*rest, **attributes).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"{name!r} cannot be set")
            super().__setitem__(name, value)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals = {
        "range": environment.globals["range"],  # refuses more than 100,000
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": PublicNamespace,
        "cycler": environment.globals["cycler"],
        "joiner": environment.globals["joiner"],
        "raise_exception": raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
    }
    return environment


def _limit(timeout_s: float) -> None:
    with suppress(ImportError):  # not on Windows
        import resource

        seconds = math.ceil(timeout_s) + 1
        for kind, most in (
            (resource.RLIMIT_AS, MEMORY_BYTES),
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_CORE, 0),
        ):
            with suppress(ValueError, OSError):  # macOS has no RLIMIT_AS
                resource.setrlimit(kind, (most, most))


def main() -> None:
    sys.path += sys.argv[1:]
    _environment()  # imports
    request = json.loads(sys.stdin.buffer.read())
    _limit(request["timeout_s"])
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    try:
        answer = {"text": render(request["template"], request["context"], request["max_chars"])}
    except MemoryError:
        answer = {"error": f"it needs more than {MEMORY_BYTES >> 20} MB"}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    sys.stdout.buffer.write(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
