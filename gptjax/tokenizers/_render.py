"""Renders one untrusted Jinja template within limits on time and memory; `chat.py` runs this program in a child
process.

    python -I _render.py FOLDERS..   reads a line of JSON, the request, prints true, then {"text": ..} or {"error": ..}

So that the rendering program starts quickly, it imports only the standard library and jinja2, which it finds in
FOLDERS. Jinja's sandbox denies a template access to Python's internals, but does not stop endless loops and does not
limit the length of strings. The process that renders an untrusted template limits its own memory and CPU time, and its
parent process kills the rendering process after the time limit.
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


def render(template: str, context: dict[str, Any], max_chars: int) -> str:
    """Render a template in the Jinja environment that transformers uses for chat templates.

    Raises:
        ValueError: the text is longer than max_chars.
        Exception: any error that Jinja or the template raises.
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
        """A Jinja extension for the block `{% generation %}..{% endgeneration %}`, which marks the assistant's text;
        the content of the block is rendered like other text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class PublicNamespace(Namespace):
        # No parameter is named `self`, so that a template can set an attribute with the name `self`: namespace(self=1).
        def __init__(*args: Any, **attributes: Any) -> None:
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
        # The range function of Jinja's sandbox raises an error for more than 100,000 elements.
        "range": environment.globals["range"],
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": PublicNamespace,
        "cycler": environment.globals["cycler"],
        "joiner": environment.globals["joiner"],
        "raise_exception": raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
    }
    return environment


def _limit(timeout_s: float) -> None:
    with suppress(ImportError):  # The module `resource` does not exist on Windows.
        import resource

        seconds = math.ceil(timeout_s) + 1
        for kind, most in (
            (resource.RLIMIT_AS, MEMORY_BYTES),
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_CORE, 0),
        ):
            with suppress(ValueError, OSError):  # The limit RLIMIT_AS does not exist on macOS.
                resource.setrlimit(kind, (most, most))


def main() -> None:
    sys.path += sys.argv[1:]
    _environment()  # Import jinja2 before `_limit` restricts the memory and CPU time of this process.
    request = json.loads(sys.stdin.buffer.readline())
    _limit(request["timeout_s"])
    print("true", flush=True)
    try:
        answer = {"text": render(request["template"], request["context"], request["max_chars"])}
    except MemoryError:
        answer = {"error": f"it needs more than {MEMORY_BYTES >> 20} MB"}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
