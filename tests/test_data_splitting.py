import random
import time

import pytest

from fedrag_cli.data.markdown import split_markdown
from fedrag_cli.data.splitting import sentence_spans, split_text
from fedrag_cli.errors import ConfigError


def sentences(text):
    return [text[start:end] for start, end in sentence_spans(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Dr. Smith met Mr. J. R. Jones. They spoke.", ["Dr. Smith met Mr. J. R. Jones.", "They spoke."]),
        (
            "Use fruit, e.g. Apples. See No. 5 and Fig. 3. No. That is wrong.",
            ["Use fruit, e.g. Apples.", "See No. 5 and Fig. 3.", "No.", "That is wrong."],
        ),
        ("Pi is 3.14 or so. It was 2.5 kg.", ["Pi is 3.14 or so.", "It was 2.5 kg."]),
        ('He said "Stop." She went on. (Really.) Yes.', ['He said "Stop."', "She went on.", "(Really.)", "Yes."]),
        ("A title\n\nA paragraph. Its end", ["A title", "A paragraph.", "Its end"]),
        (
            "A list:\n- one thing\n- another\n1. First. Then\n2. Second",
            ["A list:", "- one thing", "- another", "1. First.", "Then", "2. Second"],
        ),
        (
            "At 9 a.m. Eastern, Plan b. Then J. Doe of the U.S. Army came.",
            ["At 9 a.m. Eastern, Plan b.", "Then J. Doe of the U.S. Army came."],
        ),
        ("See version 2. it is lower case", ["See version 2. it is lower case"]),
        ("今日は晴れ。明日は雨。", ["今日は晴れ。", "明日は雨。"]),
        ("  \n\n ", []),
    ],
)
def test_sentences(text, expected):
    assert sentences(text) == expected


def test_passages_hold_whole_sentences_up_to_the_size():
    text = "One two three. Four five. Six seven eight. Nine."
    assert split_text(text, 5, 0) == ["One two three. Four five.", "Six seven eight. Nine."]


def test_overlap_repeats_whole_sentences():
    text = "One two three. Four five. Six seven eight. Nine."
    assert split_text(text, 6, 2) == ["One two three. Four five.", "Four five. Six seven eight. Nine."]
    assert split_text(text, 5, 1) == ["One two three. Four five.", "Six seven eight. Nine."]


def test_long_sentence_is_cut_between_words_and_its_parts_are_not_repeated():
    assert split_text("a b c d e f g. H i.", 3, 2) == ["a b c", "d e f", "g. H i."]
    assert split_text("a b c d e f. H i. J k.", 4, 2) == ["a b c d", "e f. H i.", "H i. J k."]


def test_short_text_is_one_passage_and_keeps_its_line_breaks():
    assert split_text("  First line\nsecond line.\n\nNext. ", 50, 10) == ["First line\nsecond line.\n\nNext."]
    assert split_text(" \n ", 50, 10) == []


@pytest.mark.parametrize(("size", "overlap"), [(10, 10), (10, 11), (10, -1)])
def test_overlap_that_does_not_fit_is_a_config_error(size, overlap):
    with pytest.raises(ConfigError, match=rf"split.overlap \({overlap}\) is not between 0 and split.size \(10\)"):
        split_text("Some text.", size, overlap)


def random_text(generator, words):
    marks = ["", "", "", ".", ".", "!", "?", ",", "...", ".)", "。"]
    gaps = [" ", " ", " ", "\n", "\n\n", "\n- ", "  ", "\t", "\n1. "]
    return "".join(word + generator.choice(marks) + generator.choice(gaps) for word in words)


def test_no_word_is_lost_and_no_passage_is_too_long():
    generator = random.Random(7)
    for _ in range(400):
        words = ["a", "B", "word", "Fig", "No", "7", "e.g", "Dr", "Ümlaut", "x" * 40]
        text = random_text(generator, generator.choices(words, k=generator.randint(0, 150)))
        size = generator.randint(1, 30)
        passages = split_text(text, size, 0)
        # A full-width mark ends a sentence without a space after it, so words are compared without their spaces.
        assert "".join("".join(passages).split()) == "".join(text.split())
        assert all(len(passage.split()) <= size for passage in passages)


def test_overlapping_passages_cover_the_text_in_order():
    generator = random.Random(8)
    for _ in range(400):
        # A long number is found at one place only.
        text = random_text(generator, [str(number) for number in generator.sample(range(10**9, 10**10), 150)])
        size = generator.randint(2, 30)
        passages = split_text(text, size, generator.randint(0, size - 1))
        covered = 0
        for passage in passages:
            start = text.index(passage)
            assert start < covered or not text[covered:start].strip()
            assert len(passage.split()) <= size
            assert start + len(passage) > covered
            covered = start + len(passage)
        assert not text[covered:].strip()


def test_long_texts_take_linear_time():
    begin = time.perf_counter()
    split_text("a. b. " * 50_000, 100, 20)
    split_text("word " * 200_000, 100, 20)
    split_text("\n " * 100_000, 100, 20)
    assert time.perf_counter() - begin < 15


MARKDOWN = """Intro here.

# Guide

## Install ##

Run it. Then rest.

```bash
# no heading
pip install x. Y

pip install z
```

## Use
Call it.
"""


def test_markdown_passages_have_their_heading_and_do_not_cross_it():
    assert split_markdown(MARKDOWN, 100, 10, title="guide") == [
        ("guide", "Intro here."),
        (
            "Install",
            "# Guide\n\n## Install ##\n\nRun it. Then rest.\n\n"
            "```bash\n# no heading\npip install x. Y\n\npip install z\n```",
        ),
        ("Use", "## Use\nCall it."),
    ]


def test_code_block_that_fits_stays_whole():
    passages = split_markdown(MARKDOWN, 13, 0)
    assert ("Install", "```bash\n# no heading\npip install x. Y\n\npip install z\n```") in passages


def test_code_block_that_does_not_fit_is_cut_between_lines():
    passages = [text for _, text in split_markdown("```\none two\nthree four\nfive six\n```", 4, 0)]
    assert passages == ["```\none two", "three four\nfive six", "```"]


def test_markdown_without_text_has_no_passages():
    assert split_markdown(" \n", 10, 0) == []
