"""Splitting texts into passages at the boundaries of sentences, and Markdown at its headings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import regex

from fedrag_cli.errors import ConfigError

SCRIPTS_WITHOUT_BLANKS = (
    "Han",
    "Hiragana",
    "Katakana",
    "Yi",
    "Thai",
    "Lao",
    "Khmer",
    "Myanmar",
    "Tibetan",
    "Balinese",
    "Javanese",
    "New_Tai_Lue",
    "Tai_Le",
    "Tai_Tham",
    "Tai_Viet",
)
# A letter, digit or mark of one of them, as part of a pattern of `regex` with V1.
WITHOUT_BLANKS = (
    "[[" + "".join(rf"\p{{Script_Extensions={name}}}" for name in SCRIPTS_WITHOUT_BLANKS) + r"]&&[\p{L}\p{N}\p{M}]]"
)
# Stands between words in some texts of these scripts.
ZERO_WIDTH_SPACE = "\u200b"
LONGEST_WORD = 20

# A blank line, or the line break before an item of a list.
BLOCK_BREAK = re.compile(r"\n[^\S\n]*\n\s*|\n(?=[^\S\n]*(?:[-*+•]|\d{1,3}[.)])[^\S\n])")
# The marks of scripts without blanks, and of others that have marks of their own, need no blank after them. Looking
# back for another mark keeps the search in a row of dots from starting anew at each.
SENTENCE_END = regex.compile(
    r"""(?:(?<![.!?…])[.!?…]++["'”’»)\]]*+(?=\s)"""
    r"""|(?:[[\p{Sentence_Terminal}།༎]--[.!?…．]]|．(?!\p{N}))++["'”’»)\]」』】〉》）］｣]*+)\s*+""",
    regex.V1,
)
# In a row of flags, \X goes back to the row's start for each.
FLAG = r"\p{Regional_Indicator}{2}"
WORD = regex.compile(
    rf"(?={WITHOUT_BLANKS})\X{ZERO_WIDTH_SPACE}?|(?:(?!{WITHOUT_BLANKS})(?!\s)(?:{FLAG}|\X)){{1,{LONGEST_WORD}}}",
    regex.V1,
)
# Where a sentence that is too long is cut first: at white space and after the marks of clauses.
CLAUSE = re.compile(r"[^\s、，；：\u200b]*+[、，；：\u200b]++|[^\s、，；：\u200b]++")
# Characters before a full stop that are looked at, so that a text without sentences takes linear time.
LONGEST_LOOK_BACK = 60

# Never the end of a sentence.
ABBREVIATION = re.compile(
    r"approx|ca|capt|cf|col|dept|dr|e\.g|eg|est|gen|gov|hon|i\.e|ie|incl|lt|mr|mrs|ms|mt|prof|rep|rev|sen|sgt|st|viz|vs",
    re.IGNORECASE,
)
# No end of a sentence where a number follows.
ABBREVIATION_BEFORE_NUMBER = re.compile(
    r"art|ch|eqs?|ex|figs?|nos?|nr|pp?|par|sect?|tab|vols?|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec",
    re.IGNORECASE,
)
# Letters with full stops between them, as in a.m. and U.S.
DOTTED_LETTERS = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")


@dataclass(frozen=True)
class Piece:
    """A stretch of a text that is kept together.

    Args:
        start: Where it starts.
        end: Where it ends.
        words: How many words it has.
        whole: It is a whole sentence or block, not part of one that was cut.
    """

    start: int
    end: int
    words: int
    whole: bool


def split_text(text: str, size: int, overlap: int) -> list[str]:
    """Split a text into passages at the boundaries of sentences.

    Args:
        text: The text.
        size: Most words of a passage; a sentence that is longer by itself is cut between clauses or words.
        overlap: Words of whole sentences that a passage repeats from the one before it, at most.

    Returns:
        The passages in order; none where the text is blank.

    Raises:
        ConfigError: The overlap is not below the size.
    """
    return pack(text, sentence_spans(text), size, overlap)


def pack(text: str, spans: Iterable[tuple[int, int]], size: int, overlap: int) -> list[str]:
    """Join stretches of a text to passages.

    Args:
        text: The text.
        spans: Starts and ends of the stretches, in order, that are kept together where they fit.
        size: Most words of a passage; a stretch that is longer by itself is cut between words.
        overlap: Words of whole stretches that a passage repeats from the one before it, at most.

    Returns:
        The passages in order, each a slice of the text.

    Raises:
        ConfigError: The overlap is not below the size.
    """
    check_sizes(size, overlap)
    pieces = [piece for start, end in spans for piece in _cut(text, start, end, size)]
    passages = []
    first = last = 0
    while last < len(pieces):
        words = sum(piece.words for piece in pieces[first:last])
        while last < len(pieces) and words + pieces[last].words <= size:
            words += pieces[last].words
            last += 1
        passages.append(text[pieces[first].start : pieces[last - 1].end])
        if last < len(pieces):
            first = _start_of_next(pieces, last, min(overlap, size - pieces[last].words))
    return passages


def check_sizes(size: int, overlap: int) -> None:
    """Check the settings of a split.

    Args:
        size: Most words of a passage.
        overlap: Words repeated, at most.

    Raises:
        ConfigError: The size is below 1, or the overlap is negative or not below the size.
    """
    if size < 1:
        raise ConfigError(f"split.size is {size}, but a passage has at least one word.", "Set split.size to 1 or more.")
    if not 0 <= overlap < size:
        raise ConfigError(
            f"split.overlap ({overlap}) is not between 0 and split.size ({size}).",
            "Set split.overlap to a part of split.size, or to 0.",
        )


def sentence_spans(text: str) -> Iterator[tuple[int, int]]:
    """Yield the starts and ends of the sentences of a text, without the space around them."""
    start = 0
    for block_break in BLOCK_BREAK.finditer(text):
        yield from _sentences_of_block(text, start, block_break.start())
        start = block_break.end()
    yield from _sentences_of_block(text, start, len(text))


def count_words(text: str) -> int:
    """Return the number of words, as the size of passages counts them."""
    if text.isascii():
        return sum(-(-len(word) // LONGEST_WORD) for word in text.split())
    return sum(1 for _ in WORD.finditer(text))


def _sentences_of_block(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    sentence = start
    for match in SENTENCE_END.finditer(text, start, end):
        if match.end() < end and _ends_sentence(text, sentence, match):
            yield from _stripped(text, sentence, match.end())
            sentence = match.end()
    yield from _stripped(text, sentence, end)


def _stripped(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    content = text[start:end]
    if content.strip():
        yield start + len(content) - len(content.lstrip()), start + len(content.rstrip())


def _ends_sentence(text: str, start: int, match: regex.Match[str]) -> bool:
    following = text[match.end()]
    if following.islower():
        return False
    if match.group().rstrip() != ".":
        return True
    words = text[max(start, match.start() - LONGEST_LOOK_BACK) : match.start()].split()
    word = words[-1].lstrip("\"'“‘«([") if words else ""
    is_initial = len(word) == 1 and word.isupper()
    is_number_of_item = word.isdigit() and len(words) == 1
    if is_initial or is_number_of_item:
        return False
    if ABBREVIATION.fullmatch(word) or DOTTED_LETTERS.fullmatch(word):
        return False
    return not (ABBREVIATION_BEFORE_NUMBER.fullmatch(word) and following.isdigit())


def _cut(text: str, start: int, end: int, size: int) -> Iterator[Piece]:
    count = count_words(text[start:end])
    if count <= size:
        yield Piece(start, end, count, whole=True)
        return
    parts = list(_parts(text, start, end, size))
    first, words = 0, 0
    for position, part in enumerate(parts):
        if words + part.words > size:
            yield Piece(parts[first].start, parts[position - 1].end, words, whole=False)
            first, words = position, 0
        words += part.words
    yield Piece(parts[first].start, parts[-1].end, words, whole=False)


def _parts(text: str, start: int, end: int, size: int) -> Iterator[Piece]:
    """Yield the clauses of a sentence, or what stands between white space; the words of those that are too long."""
    for clause in CLAUSE.finditer(text, start, end):
        count = count_words(clause.group())
        if count <= size:
            yield Piece(*clause.span(), count, whole=False)
        else:
            yield from (Piece(word.start(), word.end(), 1, whole=False) for word in WORD.finditer(text, *clause.span()))


def _start_of_next(pieces: list[Piece], last: int, room: int) -> int:
    first = last
    while first > 0 and pieces[first - 1].whole and pieces[first - 1].words <= room:
        room -= pieces[first - 1].words
        first -= 1
    return first


HEADING = re.compile(r" {0,3}#{1,6}[ \t]+(?P<title>.*)")
FENCE = re.compile(r" {0,3}(?P<marks>`{3,}(?=[^`]*$)|~{3,})(?P<rest>.*)")


@dataclass(frozen=True)
class Line:
    """One line of a Markdown text.

    Args:
        start: Where it starts.
        end: Where it ends, before white space and the line break.
        title: The heading that it is; empty where it is none.
        fence: Number of the code block that it is in, from 1; 0 outside of code.
    """

    start: int
    end: int
    title: str
    fence: int


def split_markdown(text: str, size: int, overlap: int, title: str = "") -> list[tuple[str, str]]:
    """Split a Markdown text into passages.

    A passage starts with its heading where it is the first below it. Headings with nothing below them go with the
    heading that follows. Headings are those with `#`.

    Args:
        text: The text.
        size: Most words of a passage.
        overlap: Words of whole sentences that a passage repeats from the one before it, at most.
        title: The title of passages above the first heading.

    Returns:
        The nearest heading and the text of each passage, in order.

    Raises:
        ConfigError: The overlap is not below the size.
    """
    passages = []
    for heading, lines in _sections(list(_lines(text))):
        spans = list(_spans(text, lines, size))
        body = max((line.end for line in lines if line.title), default=0)
        headings = sum(start < body for start, _ in spans)
        if 0 < headings < len(spans) and count_words(text[slice(*spans[headings])]) > size:
            # A sentence that is cut takes its headings into its first part.
            spans[: headings + 1] = [(spans[0][0], spans[headings][1])]
        passages += [(heading or title, passage) for passage in pack(text, spans, size, overlap)]
    return passages


def _lines(text: str) -> Iterator[Line]:
    start = count = 0
    marks = ""
    for line in text.split("\n"):
        end = start + len(line.rstrip())
        match = FENCE.fullmatch(line)
        if marks:
            yield Line(start, end, "", count)
            if match and match["marks"].startswith(marks) and not match["rest"].strip():
                marks = ""
        elif match:
            marks = match["marks"]
            count += 1
            yield Line(start, end, "", count)
        else:
            heading = HEADING.fullmatch(line)
            yield Line(start, end, _without_closing_marks(heading["title"]) if heading else "", 0)
        start += len(line) + 1


def _without_closing_marks(title: str) -> str:
    """Return the title of `# Title #`; a pattern that matches the marks at the end takes quadratic time."""
    title = title.strip(" \t")
    bare = title.rstrip("#")
    return bare.rstrip(" \t") if bare.endswith((" ", "\t")) else title


def _sections(lines: list[Line]) -> Iterator[tuple[str, list[Line]]]:
    title = ""
    section: list[Line] = []
    has_body = False
    for line in lines:
        if line.title:
            if has_body:
                yield title, section
                section, has_body = [], False
            title = line.title
        else:
            has_body = has_body or line.end > line.start
        section.append(line)
    yield title, section


def _spans(text: str, lines: list[Line], size: int) -> Iterator[tuple[int, int]]:
    for group in _groups(lines):
        start, end = group[0].start, group[-1].end
        if not group[0].fence:
            yield from ((start + first, start + last) for first, last in sentence_spans(text[start:end]))
        elif count_words(text[start:end]) <= size:
            yield start, end
        else:
            yield from ((line.start, line.end) for line in group)


def _groups(lines: list[Line]) -> Iterator[list[Line]]:
    """Yield headings by themselves, code blocks, and the lines between them."""
    group: list[Line] = []
    for line in lines:
        if group and (line.title or group[-1].title or line.fence != group[-1].fence):
            yield group
            group = []
        group.append(line)
    if group:
        yield group
