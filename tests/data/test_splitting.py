import random
import time

import pytest
import regex

from fedrag_cli.data.splitting import count_words, sentence_spans, split_markdown, split_text
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
    assert len(split_text("\U0001f1e9\U0001f1ea" * 50_000, 100, 20)) == 25
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


def test_a_long_sentence_is_cut_with_its_headings():
    assert split_markdown("# A\n\n## B\n" + "ก" * 20, 10, 0) == [
        ("B", "# A\n\n## B\n" + "ก" * 6),
        ("B", "ก" * 10),
        ("B", "ก" * 4),
    ]
    assert split_markdown("a b c d\n# A\n\nb c d e f", 4, 0) == [("", "a b c d"), ("A", "# A\n\nb c"), ("A", "d e f")]


def test_code_block_that_fits_stays_whole():
    passages = split_markdown(MARKDOWN, 13, 0)
    assert ("Install", "```bash\n# no heading\npip install x. Y\n\npip install z\n```") in passages


def test_code_block_that_does_not_fit_is_cut_between_lines():
    passages = [text for _, text in split_markdown("```\none two\nthree four\nfive six\n```", 4, 0)]
    assert passages == ["```\none two", "three four\nfive six", "```"]


def test_markdown_without_text_has_no_passages():
    assert split_markdown(" \n", 10, 0) == []


WITHOUT_BLANKS = {
    "Chinese": "中文句子没有空格，",
    "Japanese": "カタカナとひらがなー",
    "Thai": "ภาษาไทยน้ำที่",
    "Lao": "ພາສາລາວ",
    "Khmer": "ភាសាខ្មែរ",
    "Burmese": "မြန်မာဘာသာ",
    "Tibetan": "བོད་སྐད་",
}


@pytest.mark.parametrize("language", WITHOUT_BLANKS)
def test_scripts_without_blanks_keep_to_the_size(language):
    text = WITHOUT_BLANKS[language] * 400
    passages = split_text(text, 120, 20)
    if language in ("Chinese", "Japanese"):
        assert max(map(len, passages)) <= 120
    assert "".join(passages) == text
    clusters = [regex.findall(r"\X", passage) for passage in passages]
    assert sum(map(len, clusters)) == len(regex.findall(r"\X", text))
    counts = [
        sum(cluster[0].isalpha() or regex.match(r"\p{M}", cluster) is not None for cluster in row) for row in clusters
    ]
    assert max(counts) <= 120
    assert min(counts[:-1]) >= 75


@pytest.mark.parametrize("word", ["x", "ж", "한국", "नमस्ते", "漢", "ก", "👨‍👩‍👧‍👦", "e\u0301", "."])
def test_a_word_without_end_is_cut_between_characters(word):
    text = word * (20_000 // len(word))
    passages = split_text(text, 120, 20)
    assert "".join(passages) == text
    assert all(regex.fullmatch(r"\X+?", passage) and len(regex.findall(r"\X", passage)) <= 2400 for passage in passages)
    assert sum(len(regex.findall(r"\X", passage)) for passage in passages) == len(regex.findall(r"\X", text))
    assert split_markdown(text, 120, 20) == [("", passage) for passage in passages]


def test_long_words_that_fit_stay_whole():
    words = ["Donaudampfschifffahrtsgesellschaftskapitän", "https://example.org/a/long/path?with=parameters", "and"]
    assert [count_words(word) for word in words] == [3, 3, 1]
    assert split_text(" ".join(words * 3), 7, 0) == [" ".join(words)] * 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("これは「本当ですか？」と聞いた。はい！", ["これは「本当ですか？」", "と聞いた。", "はい！"]),
        ("円周率は３．１４です．次の文．", ["円周率は３．１４です．", "次の文．"]),
        ("हिंदी वाक्य। दूसरा॥", ["हिंदी वाक्य।", "दूसरा॥"]),
        ("جملة أولى. هل؟ نعم۔", ["جملة أولى.", "هل؟", "نعم۔"]),
        ("ខ្មែរ។ទីពីរ។ မင်္ဂလာပါ။နောက်။", ["ខ្មែរ។", "ទីពីរ។", "မင်္ဂလာပါ။", "နောက်။"]),
        ("Really?! Yes... (So.) e.g. this", ["Really?!", "Yes...", "(So.) e.g. this"]),
    ],
)
def test_sentences_of_other_scripts(text, expected):
    assert sentences(text) == expected


def test_long_sentences_without_blanks_are_cut_at_clauses():
    text = "一二三四五，六七八九，十一二三四五六七八。"
    assert split_text(text, 11, 0) == ["一二三四五，六七八九，", "十一二三四五六七八。"]
    assert split_text("一二三「四」五六七八九十。", 6, 0) == ["一二三「四」", "五六七八九十", "。"]
    assert split_text("ภาษาไทย ภาษาลาว ภาษาไทย", 10, 0) == ["ภาษาไทย", "ภาษาลาว", "ภาษาไทย"]


@pytest.mark.parametrize(
    "part", [".", '."', "!?", "…", "。」", ". ", "\n- ", "# ", " ", "`", "~~~\n", "a", "、", "\u0301"]
)
def test_twice_the_text_takes_twice_the_time(part):
    def seconds(length):
        text = (part * length)[:length]
        begin = time.perf_counter()
        split_text(text, 120, 20)
        split_markdown(f"# a{text}b\n{text}\nb", 120, 20)
        return time.perf_counter() - begin

    # Four times the time for twice the text would be quadratic: 16 times and more here.
    short = min(seconds(1_000) for _ in range(3))
    assert min(seconds(8_000) for _ in range(2)) < 30 * short + 0.2
