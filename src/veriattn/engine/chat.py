"""Chat templates: jinja2 in a sandbox, deterministic, with bounds on the work and on the size of every value.

Trust: the template comes with the model, whose digest pins it, and is still treated as hostile: no attribute tricks
(jinja2's immutable sandbox), no clock, no randomness, no unbounded loop, no value that explodes.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from veriattn.errors import ModelError, UsageError

MAX_TEMPLATE_CHARS = 1 << 18
#: No value that a template makes, and no result, is longer.
MAX_RENDERED_CHARS = 4 << 20
#: Loop rounds, calls, and values looked at (a string counts once per 256 characters).
MAX_STEPS = 500_000

_CHARS_PER_STEP = 256
_MAX_INT_BITS = 256
_HINT = "the template comes with the model; `--raw` does without it"

# Not deterministic, or growing a value by more than its arguments show.
_REMOVED_FILTERS = (
    "random", "format", "center", "wordwrap", "xmlattr", "urlize", "pprint", "filesizeformat", "batch", "slice", "sum",
)  # fmt: skip
_REMOVED_METHODS = frozenset({"format", "format_map", "center", "ljust", "rjust", "zfill", "expandtabs", "translate"})
# What a template or jinja2 itself raises over values of the wrong kind.
_TEMPLATE_FAILURES = (
    jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError,
    SyntaxError, MemoryError,
)  # fmt: skip

Message = Mapping[str, Any]


class _TemplateLimit(jinja2.TemplateRuntimeError):
    """A bound of this module was passed."""


class _RaisedByTemplate(jinja2.TemplateRuntimeError):
    """The template called raise_exception: it does not accept these messages."""


def _raise_exception(message: object) -> NoReturn:
    raise _RaisedByTemplate(str(message)[:500])


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """What transformers gives templates: plain JSON, without jinja2's HTML escapes."""
    if indent is not None and not 0 <= indent <= 16:
        raise _TemplateLimit("tojson indents by more than 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is all there is to it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _InsertBounds(NodeTransformer):
    """Let loops, macros, literal text, concatenations and literal containers report to the environment."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment

    def _call(self, name: str, args: list[nodes.Expr], like: nodes.Node) -> nodes.Call:
        # An attribute of the environment, not a name: a template cannot put something else in its place.
        call = nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None)
        return call.set_environment(self._environment).set_lineno(like.lineno)  # type: ignore[return-value]

    def _counted(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        step = nodes.ExprStmt(self._call("bound_emit", [nodes.Const(0)], node))
        node.body.insert(0, step.set_environment(self._environment).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _counted  # noqa: N815 - names that jinja2 looks up

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        literal = sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData))
        if literal:
            node.nodes.insert(0, self._call("bound_emit", [nodes.Const(literal)], node))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._call("bound_concat", node.nodes, node)

    def _container(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node, nodes.Tuple) and node.ctx != "load":
            return node
        return self._call("bound_value", [node], node)

    visit_List = visit_Tuple = visit_Dict = _container  # noqa: N815


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Every loop, macro, call, filter, growing operator, literal and output of a template passes through `_charge`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            cache_size=0,
            finalize=self._finalize,
        )
        self._steps = MAX_STEPS
        self._emitted = 0
        self._sizes: dict[int, tuple[object, int, str | None]] = {}
        self.filters["tojson"] = _tojson
        for name in _REMOVED_FILTERS:
            self.filters.pop(name, None)
        for name, function in list(self.filters.items()):
            self.filters[name] = self._bounded_filter(name, function)
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception

    def restart(self) -> None:
        """Begin another rendering with all of its allowance."""
        self._steps, self._emitted = MAX_STEPS, 0
        self._sizes.clear()

    def _charge(self, steps: int) -> None:
        self._steps -= steps
        if self._steps < 0:
            raise _TemplateLimit("it does too much work or does not come to an end")

    def _measure(self, *values: object, printable: bool = False) -> int:
        """Characters and elements of `values`, all levels. Raises: _TemplateLimit where they are too many."""
        total = 0
        for value in values:
            size, opaque = self._size(value)
            total += size
            if printable and opaque is not None:
                # The text of other objects holds addresses or depends on the order of a hash table.
                raise _TemplateLimit(f"it writes out a {opaque}")
        return self._bounded(total)

    def _size(self, value: object) -> tuple[int, str | None]:
        """Size of a value and the name of a type in it that has no fixed text."""
        self._charge(1)
        if isinstance(value, str | bytes):
            self._charge(len(value) // _CHARS_PER_STEP)
            return 1 + len(value), None
        if isinstance(value, int):
            if value.bit_length() > _MAX_INT_BITS:
                raise _TemplateLimit("it makes a huge number")
            return 1, None
        if not isinstance(value, list | tuple | dict):
            fixed = value is None or isinstance(value, float | Undefined)
            return 1, None if fixed else type(value).__name__
        known = self._sizes.get(id(value))
        if known is None:
            parts = (
                [self._size(part) for part in (*value, *value.values())]
                if isinstance(value, dict)
                else [self._size(part) for part in value]
            )
            size = self._bounded(1 + sum(size for size, _ in parts))
            # The sandbox lets nothing change a container, and the reference keeps its id from being used again.
            known = self._sizes[id(value)] = (value, size, next((name for _, name in parts if name is not None), None))
        return known[1], known[2]

    @staticmethod
    def _bounded(size: int) -> int:
        if size > MAX_RENDERED_CHARS:
            raise _TemplateLimit(f"it makes a value of more than {MAX_RENDERED_CHARS} characters")
        return size

    def bound_emit(self, size: int) -> str:
        # Counts what goes into buffers (macros, set blocks) too, which the reader of the output never sees.
        self._charge(1)
        self._emitted += size
        if self._emitted > MAX_RENDERED_CHARS:
            raise _TemplateLimit(f"it writes more than {MAX_RENDERED_CHARS} characters")
        return ""

    def _finalize(self, value: Any) -> Any:
        self.bound_emit(self._measure(value, printable=True) if not isinstance(value, str) else len(value))
        return value

    def bound_concat(self, *parts: Any) -> str:
        self._measure(*parts, printable=True)
        return "".join(map(str, parts))

    def bound_value(self, value: Any) -> Any:
        self._measure(value)
        return value

    def _replaced(self, text: object, args: Sequence[object]) -> None:
        self._measure(text, *args, printable=True)
        if len(args) >= 2:
            size, old, new = (len(str(value)) for value in (text, *args[:2]))
            if size + (size // max(1, old) + 1) * new > MAX_RENDERED_CHARS:
                raise _TemplateLimit("it replaces by too long a text too often")

    def _joined(self, separator: object, parts: object) -> None:
        if not isinstance(parts, str | list | tuple | dict | Undefined):
            raise _TemplateLimit("it joins something other than a list; pass it through `list` first")
        count = 0 if isinstance(parts, Undefined) else len(parts)
        if self._measure(parts, printable=True) + count * self._measure(separator, printable=True) > MAX_RENDERED_CHARS:
            raise _TemplateLimit("it joins too much text")

    def _bounded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        # jinja2 passes the context or environment first where the function asks for it.
        at = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            values = args[at:]
            self._measure(*values, *kwargs.values())
            if name == "join":
                values = (list(values[0]) if not isinstance(values[0], str | Undefined) else values[0], *values[1:])
                self._joined(kwargs.get("d", values[1] if len(values) > 1 else ""), values[0])
            elif name == "replace":
                self._replaced(values[0], [*values[1:], *(kwargs[k] for k in ("old", "new") if k in kwargs)])
            elif name == "indent":
                width = kwargs.get("width", values[1] if len(values) > 1 else 4)
                if not (isinstance(width, int) and 0 <= width <= 16) and not isinstance(width, str):
                    raise _TemplateLimit("it indents by more than 16")
                self._replaced(values[0], ["\n", "\n" + width if isinstance(width, str) else " " * (width + 1)])
            result = function(*args[:at], *values, **kwargs)
            self._measure(result)
            return result

        return bounded

    def wrap_str_format(self, value: Any) -> None:
        """jinja2 would put its own `format` in place of the method; here there is none."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """jinja2's rules, and no method that pads or formats: its result is not bounded by its arguments' size."""
        if isinstance(obj, str | bytes) and attr in _REMOVED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`+ * ** %`, which can make something large out of something small."""
        if operator == "%" and isinstance(left, str | bytes):
            raise SecurityError("formatting with % is not available to chat templates")
        if operator == "**" and not (isinstance(right, int | float) and abs(right) <= 64):
            raise _TemplateLimit("it raises to a power above 64")
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                repeats = isinstance(times, int) and isinstance(value, str | bytes | list | tuple)
                if repeats and self._measure(value) * times > MAX_RENDERED_CHARS:
                    raise _TemplateLimit("it repeats a value too often")
        self._measure(left, right)
        result = super().call_binop(context, operator, left, right)
        self._measure(result)
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """A call by the template: of a method, a macro or one of the globals."""
        receiver, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if receiver is __self:
            # A call that _InsertBounds put there; no template gets hold of the environment.
            return __obj(*args)
        __self._measure(*args, *kwargs.values())
        if isinstance(receiver, str | bytes):
            if name == "replace":
                __self._replaced(receiver, args)
            elif name == "join" and args:
                __self._joined(receiver, args[0])
        result = super().call(__context, __obj, *args, **kwargs)
        __self._measure(result)
        return result


def _content(message: Message, where: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        texts = []
        for part in content:
            if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise UsageError(f"{where}: a part of its content is not text", hint="this program knows text only")
            texts.append(part["text"])
        return "\n".join(texts)
    raise UsageError(f"{where} has no content", hint='a message is {"role": "user", "content": "..."}')


def checked_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Role, content and name of each message, all strings; parts of type text are joined by newlines.

    Fields that are empty are ignored, as clients send back what they were given. Raises: UsageError.
    """
    if not messages:
        raise UsageError("there are no messages", hint="give at least one")
    checked = []
    for i, message in enumerate(messages):
        where = f"message {i}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UsageError(f"{where} has no role", hint='a message is {"role": "user", "content": "..."}')
        entry = {"role": message["role"], "content": _content(message, where)}
        for key, value in message.items():
            if key in entry or value is None or value in ([], {}):
                continue
            if key != "name" or not isinstance(value, str):
                raise UsageError(f"{where}: the field {str(key)[:40]!r} is not supported")
            entry["name"] = value
        checked.append(entry)
    return checked


class ChatTemplate:
    """A compiled chat template. Rendering is a function of its arguments alone; any thread may render.

    As in transformers, `tools` and `documents` are none and `raise_exception`, `tojson`, loop controls and generation
    blocks exist. `strftime_now` does not: a prompt must not depend on the day. Templates test for it and have a
    default.

    Raises: ModelError for a template that does not compile.
    """

    def __init__(self, source: str, bos_token: str | None, eos_token: str | None) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelError(f"the chat template is longer than {MAX_TEMPLATE_CHARS} characters", hint=_HINT)
        self._lock = threading.Lock()
        self._environment = _BoundedEnvironment()
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        try:
            tree = self._environment.parse(source)
            _InsertBounds(self._environment).visit(tree)
            code = self._environment.compile(tree)
            self._template = jinja2.Template.from_code(self._environment, code, self._environment.make_globals(None))
        except _TEMPLATE_FAILURES as e:
            raise ModelError(f"the chat template does not compile: {_reason(e)}", hint=_HINT) from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt's text.

        Raises: UsageError for messages that are malformed or that the template refuses; ModelError for a template that
        fails, loops, or writes too much.
        """
        checked = checked_messages(messages)
        variables: dict[str, Any] = {"messages": checked, "add_generation_prompt": add_generation_prompt}
        variables |= {"tools": None, "documents": None, **self._tokens}
        with self._lock:
            self._environment.restart()
            try:
                return self._template.render(variables)
            except _RaisedByTemplate as e:
                raise UsageError(f"the chat template refuses these messages: {e}") from None
            except _TEMPLATE_FAILURES as e:
                raise ModelError(f"the chat template fails: {_reason(e)}", hint=_HINT) from None


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__.lstrip('_')}: {str(error)[:300]}"
