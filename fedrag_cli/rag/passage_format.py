"""Passages as text of a prompt, in which fields without a value leave no trace."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import DataError

WRAPPERS = {"(": ")", "[": "]", "{": "}", "«": "»", "“": "”", "‘": "’", '"': '"', "'": "'", "*": "*", "`": "`"}
OPENING_TAG = re.compile(r"<(\w+)>\Z")
LABEL = re.compile(r"\w[\w ]*[:=][ \t]*\Z")
# A tag with attributes up to the value of one of them, and the name of that one.
TAG = re.compile(r"<([\w:-]+)\s[^<>]*\Z")
ATTRIBUTE = re.compile(r"\s+[\w:-]+=([\"']?)\Z")
HEADING = re.compile(r"\s*#.*|.*:\s*")
# What stands under a heading in Markdown.
UNDERLINE = re.compile(r"\s*(?:-{3,}|={3,})?\s*")
_ABSENT: Any = object()


@dataclass(eq=False)
class _Field:
    """A field of the template, with the label and the brackets around it; arguments as in `str.format`."""

    name: str
    conversion: str | None
    spec: str
    before: str = ""
    after: str = ""

    def fields(self) -> Iterator[_Field]:
        """Yield itself."""
        yield self

    def written(self, texts: Mapping[_Field, str]) -> str:
        """Return its text, without what stands around it."""
        return texts[self]


@dataclass(eq=False)
class _Line:
    """A line of the template, a tag with attributes, or fields in brackets: its parts, and the texts around them."""

    texts: list[str]
    parts: list[_Field | _Line] = dataclass_field(default_factory=list)
    before: str = ""
    after: str = ""
    is_tag: bool = False
    """Whether it is a tag, which stays without its empty attributes."""
    opens: bool = False
    """Whether the line has such a tag that a later line closes."""

    def fields(self) -> Iterator[_Field]:
        """Yield the fields from left to right."""
        for part in self.parts:
            yield from part.fields()

    def written(self, texts: Mapping[_Field, str]) -> str:
        """Return it; an empty field goes with what joins it to the part before, or after it where it is first."""
        written: list[str] = []
        for number, (part, joint) in enumerate(zip(self.parts, self.texts, strict=False)):
            text = part.written(texts)
            if number and (self.is_tag or (text and written)):
                written.append(joint)
            if text:
                written.append(part.before + text + part.after)
        return "".join([self.texts[0], *written, *self.texts[1:][-1:]])


class PassageFormat:
    """Writes passages the way `rag_system.prompt.passage_template` says; the rule of empty fields is told there.

    Args:
        template: Text with {text}, {id} and fields of the passages' metadata.
    """

    def __init__(self, template: str) -> None:
        """Read the template's lines."""
        self._lines = _lines(template)
        names = dict.fromkeys(field.name for line in self._lines for field in line.fields())
        self._unseen = [name for name in names if name not in ("id", "text")]

    def require_fields(self, passages: Iterable[KnowledgeNode]) -> None:
        """Note which of the template's fields there are; what some passage has may be absent from others.

        Raises:
            DataError: The template names a field that none of these passages has, nor one of an earlier call.
        """
        first = None
        for passage in passages if self._unseen else ():
            first = first or passage
            self._unseen = [name for name in self._unseen if _is_absent(name, _values(passage))]
            if not self._unseen:
                return
        if first is not None:
            raise DataError(
                f"The passage '{first.id}' has no field '{self._unseen[0]}', which rag_system.prompt.passage_template "
                "names, and no other passage has it.",
                f"Its fields: {', '.join(sorted({*first.metadata, 'id', 'text'}))}.",
            )

    def write(self, passage: KnowledgeNode, as_text: Callable[[str], str] = str) -> str:
        """Return the text of one passage, with `as_text` applied to the text of each field.

        Raises:
            DataError: A value does not take the format that the template gives it.
        """
        values = _values(passage)
        try:
            texts = {field: _text(field, values) for line in self._lines for field in line.fields()}
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise DataError(
                f"The passage '{passage.id}' does not fit rag_system.prompt.passage_template: {error}.",
                "Name plain fields there, such as {title}, or give every passage a value that the format takes.",
            ) from error
        return _joined(self._lines, {field: as_text(text) if text else "" for field, text in texts.items()})


def plain_text(value: Any) -> str:
    """Return a value of a row as text for people.

    Null, NaN and blank texts are empty; a list is its items and an object its fields, both without empty ones and
    joined by commas; a whole number is written without `.0`, which tables with empty cells give it.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str):
        return value if value.strip() else ""
    if isinstance(value, Mapping):
        named = {name: plain_text(item) for name, item in value.items()}
        return ", ".join(f"{name}: {text}" for name, text in named.items() if text)
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(filter(None, map(plain_text, value)))
    # Only NaN differs from itself.
    if value is None or value != value:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _lines(template: str) -> list[_Line]:
    lines = [_Line([""])]
    for literal, name, spec, conversion in string.Formatter().parse(template):
        first, *others = literal.split("\n")
        lines[-1].texts[-1] += first
        lines += [_Line([text]) for text in others]
        if name is not None:
            lines[-1].parts.append(_Field(name, conversion, spec or ""))
            lines[-1].texts.append("")
    for line in lines:
        while _take_tag(line):
            pass
        _take_labels(line)
        while _group(line):
            _take_labels(line)
    return lines


def _take_tag(line: _Line) -> bool:
    """Make one part of the first tag of a line that has fields as attributes; return whether there is one."""
    for first, left in enumerate(line.texts[:-1]):
        tag = TAG.search(left)
        last = next((n for n in range(first + 1, len(line.texts)) if ">" in line.texts[n]), None)
        if not tag or last is None:
            continue
        end = line.texts[last].index(">") + 1
        texts = [tag[0], *line.texts[first + 1 : last], line.texts[last][:end]]
        inner = _Line(texts, line.parts[first:last], is_tag=True)
        for number, part in enumerate(inner.parts):
            if name := ATTRIBUTE.search(inner.texts[number]):
                inner.texts[number] = inner.texts[number][: name.start()]
                inner.texts[number + 1] = inner.texts[number + 1].removeprefix(name[1])
                part.before, part.after = name[0], name[1]
        line.texts[first], line.texts[last] = left[: tag.start()], line.texts[last][end:]
        line.opens |= not inner.texts[-1].endswith("/>") and f"</{tag[1]}>" not in "".join(line.texts[last:])
        line.parts[first:last] = [inner]
        del line.texts[first + 1 : last]
        return True
    return False


def _group(line: _Line) -> bool:
    """Give the first brackets of a line, quotes or tags, to what stands in them; return whether there are any."""
    for first, left in enumerate(line.texts[:-1]):
        tag = OPENING_TAG.search(left)
        opening = tag[0] if tag else left[-1:]
        closing = f"</{tag[1]}>" if tag else WRAPPERS.get(opening, "")
        for last, right in enumerate(line.texts[first + 1 :], start=first) if closing else ():
            if right.startswith(closing):
                line.texts[first], line.texts[last + 1] = left.removesuffix(opening), right.removeprefix(closing)
                texts = ["", *line.texts[first + 1 : last + 1], ""]
                line.parts[first : last + 1] = [_Line(texts, line.parts[first : last + 1], opening, closing)]
                del line.texts[first + 1 : last + 1]
                return True
    return False


def _take_labels(line: _Line) -> None:
    for number, part in enumerate(line.parts):
        if label := LABEL.search(line.texts[number]):
            line.texts[number] = line.texts[number][: label.start()]
            part.before = label[0] + part.before


def _joined(lines: Sequence[_Line], texts: Mapping[_Field, str]) -> str:
    """Return the lines whose fields are not all empty; such a one takes its heading and the blank lines with it."""
    kept: list[tuple[_Line, str]] = []
    skipping = False
    for line in lines:
        if line.parts and not line.opens and not any(texts[field] for field in line.fields()):
            while kept and not kept[-1][0].parts and HEADING.fullmatch(kept[-1][0].texts[0]):
                kept.pop()
            skipping = True
        elif not skipping or line.parts or not UNDERLINE.fullmatch(line.texts[0]):
            kept.append((line, line.written(texts)))
            skipping = False
    while skipping and kept and not kept[-1][1].strip():
        kept.pop()
    return "\n".join(text for _, text in kept)


def _values(passage: KnowledgeNode) -> dict[str, Any]:
    return {**passage.metadata, "id": passage.id, "text": passage.text}


def _value(name: str, values: Mapping[str, Any]) -> Any:
    """Return the value of a field, or `_ABSENT` where it is not there, or what it would be a part of is empty."""
    try:
        return string.Formatter().get_field(name, (), values)[0]
    except (KeyError, IndexError):
        return _ABSENT
    except (AttributeError, TypeError):
        if plain_text(values.get(re.split(r"[.\[]", name, maxsplit=1)[0])):
            raise
        return _ABSENT


def _is_absent(name: str, values: Mapping[str, Any]) -> bool:
    try:
        return _value(name, values) is _ABSENT
    except (AttributeError, TypeError):
        # `write` says what is wrong with it.
        return False


def _text(field: _Field, values: Mapping[str, Any]) -> str:
    value = _value(field.name, values)
    text = "" if value is _ABSENT else plain_text(value)
    if not text:
        return ""
    if field.conversion:
        return format(string.Formatter().convert_field(value, field.conversion), field.spec)
    # Numbers and dates have formats of their own.
    return format(value if field.spec and not isinstance(value, Mapping | list | tuple) else text, field.spec)
