import json
import os

import pytest

from fedrag_cli.data.config import (
    BeirCorpusConfig,
    FileCorpusConfig,
    HuggingFaceCorpusConfig,
    PassageColumns,
    SplitConfig,
    SquadCorpusConfig,
    TextCorpusConfig,
)
from fedrag_cli.data.corpora import load_corpus
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import ConfigError, DataError


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_file_corpus_keeps_other_columns_as_metadata(tmp_path):
    path = write_jsonl(
        tmp_path / "c.jsonl", {"id": "a", "text": " One. ", "title": "T", "n": 1}, {"id": 7, "text": "Two."}
    )
    assert load_corpus(FileCorpusConfig(path=path)) == [
        KnowledgeNode("a", "One.", {"title": "T", "n": 1}),
        KnowledgeNode("7", "Two."),
    ]


def test_rows_without_ids_are_numbered(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", {"text": "One."}, {"text": "Two."})
    assert [node.id for node in load_corpus(FileCorpusConfig(path=path))] == ["c-0001", "c-0002"]


def test_bad_rows_are_listed(tmp_path):
    path = write_jsonl(
        tmp_path / "c.jsonl",
        {"id": "a", "text": "One."},
        {"text": "Two."},
        {"id": "a", "text": "Three."},
        {"id": None, "text": ""},
        {"id": " ", "text": 5},
        {"id": "b"},
    )
    with pytest.raises(DataError) as caught:
        load_corpus(FileCorpusConfig(path=path))
    assert caught.value.message.splitlines() == [
        "7 problems in c.jsonl:",
        "c.jsonl:2: has no 'id'",
        "c.jsonl:3: id 'a' is that of c.jsonl:1",
        "c.jsonl:4: id is missing (null)",
        "c.jsonl:4: text is empty",
        "c.jsonl:5: id is blank",
        "c.jsonl:5: text is a number, not a text",
        "c.jsonl:6: has no 'text'",
    ]


def test_missing_columns_name_the_key(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", {"id": "a", "body": "One."})
    with pytest.raises(DataError, match=r"c.jsonl has no column 'text'; its columns are: id, body\.") as caught:
        load_corpus(FileCorpusConfig(path=path))
    assert caught.value.hint == "Set `columns.text` to the name of the column that holds it: did you mean 'body'?"
    with pytest.raises(DataError, match="no column 'key'") as caught:
        load_corpus(FileCorpusConfig(path=path, columns=PassageColumns(id="key", text="body")))
    assert "`columns.id`" in caught.value.hint


def test_long_texts_are_split_and_short_ones_keep_their_id(tmp_path):
    path = write_jsonl(
        tmp_path / "c.jsonl",
        {"id": "long", "text": "One two. Three four. Five six.", "t": 1},
        {"id": "short", "text": "One."},
    )
    assert load_corpus(FileCorpusConfig(path=path, split=SplitConfig(size=4, overlap=0))) == [
        KnowledgeNode("long#0", "One two. Three four.", {"t": 1, "document_id": "long"}),
        KnowledgeNode("long#1", "Five six.", {"t": 1, "document_id": "long"}),
        KnowledgeNode("short", "One."),
    ]
    with pytest.raises(ConfigError, match=r"split\.overlap"):
        load_corpus(FileCorpusConfig(path=path, split=SplitConfig(size=4)))


def test_ids_that_collide_after_the_split_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", {"id": "a#0", "text": "One."}, {"id": "a", "text": "One two. Three four."})
    with pytest.raises(DataError, match="passage 2: id 'a#0' is that of passage 1"):
        load_corpus(FileCorpusConfig(path=path, split=SplitConfig(size=2, overlap=0)))


def test_limit(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", {"text": "One."}, {"text": ""})
    assert len(load_corpus(FileCorpusConfig(path=path, limit=1))) == 1


def text_folder(tmp_path):
    folder = tmp_path / "docs"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "b.txt").write_bytes("\ufeffOne two. Three four.\r\n\r\nFive.".encode())
    (folder / "sub" / "a.md").write_text("# Top\nText here.\n\n## Next\nMore.", encoding="utf-8")
    (folder / ".git" / "hidden.txt").write_text("hidden", encoding="utf-8")
    (folder / ".hidden.txt").write_text("hidden", encoding="utf-8")
    (folder / "other.rst").write_text("other", encoding="utf-8")
    return folder


def test_text_corpus(tmp_path):
    folder = text_folder(tmp_path)
    config = TextCorpusConfig(path=str(folder), split=SplitConfig(size=4, overlap=0))
    assert load_corpus(config) == [
        KnowledgeNode("b.txt#0", "One two. Three four.", {"path": "b.txt", "title": "b", "document_id": "b.txt"}),
        KnowledgeNode("b.txt#1", "Five.", {"path": "b.txt", "title": "b", "document_id": "b.txt"}),
        KnowledgeNode(
            "sub/a.md#0", "# Top\nText here.", {"path": "sub/a.md", "title": "Top", "document_id": "sub/a.md"}
        ),
        KnowledgeNode("sub/a.md#1", "## Next\nMore.", {"path": "sub/a.md", "title": "Next", "document_id": "sub/a.md"}),
    ]


def test_text_corpus_of_one_file(tmp_path):
    path = text_folder(tmp_path) / "other.rst"
    assert [node.id for node in load_corpus(TextCorpusConfig(path=str(path)))] == ["other.rst#0"]


def test_text_corpus_without_files_names_the_patterns(tmp_path):
    with pytest.raises(DataError, match=r"has no files that fit \*\.txt, \*\.md, \*\.markdown"):
        load_corpus(TextCorpusConfig(path=str(tmp_path)))
    with pytest.raises(ConfigError, match="The pattern '/x' cannot be used"):
        load_corpus(TextCorpusConfig(path=str(tmp_path), patterns=("/x",)))
    with pytest.raises(DataError, match="does not exist"):
        load_corpus(TextCorpusConfig(path=str(tmp_path / "docs")))


def test_blank_text_files_are_listed(tmp_path):
    folder = text_folder(tmp_path)
    (folder / "empty.txt").touch()
    (folder / "sub" / "blank.md").write_text("\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_corpus(TextCorpusConfig(path=str(folder)))
    assert caught.value.message.splitlines()[1:] == ["empty.txt: has no text", "sub/blank.md: has no text"]
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "utf16.txt").write_bytes("no".encode("utf-16-le"))
    with pytest.raises(DataError) as caught:
        load_corpus(TextCorpusConfig(path=str(folder)))
    assert caught.value.message.splitlines()[2::2] == [
        "latin.txt: is not UTF-8 text: the byte 0xe9 at offset 3 cannot be decoded.",
        "utf16.txt: is not UTF-8 text: it has a NUL byte at offset 1.",
    ]
    assert "iconv" in caught.value.hint


def squad_file(tmp_path, *articles):
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "1.1", "data": articles}), encoding="utf-8")
    return str(path)


def test_squad_corpus(tmp_path):
    paragraphs = [{"context": "One.", "qas": []}, {"context": "Two.", "qas": []}]
    path = squad_file(tmp_path, *({"title": "New York", "paragraphs": paragraphs} for _ in range(2)))
    assert load_corpus(SquadCorpusConfig(path=path))[1] == KnowledgeNode("New_York-1", "Two.", {"title": "New York"})
    ids = [node.id for node in load_corpus(SquadCorpusConfig(path=path, limit=3))]
    assert ids == ["New_York-0", "New_York-1", "New_York_2-0"]


def test_bad_squad_corpus(tmp_path):
    path = squad_file(tmp_path, {"title": "A", "paragraphs": [{"context": " "}, {}]}, {"title": "B"}, 3)
    with pytest.raises(DataError) as caught:
        load_corpus(SquadCorpusConfig(path=path))
    assert caught.value.message.splitlines() == [
        "4 problems in squad.json:",
        "squad.json data[0].paragraphs[0]: context is blank",
        "squad.json data[0].paragraphs[1]: has no 'context'",
        "squad.json data[1]: has no 'paragraphs'",
        "squad.json data[2]: is a number, not an object",
    ]
    with pytest.raises(DataError, match="is not in SQuAD format"):
        load_corpus(SquadCorpusConfig(path=write_jsonl(tmp_path / "x.json", [])))


def test_beir_corpus(tmp_path):
    write_jsonl(
        tmp_path / "corpus.jsonl",
        {"_id": "d1", "title": "Title", "text": "Text.", "url": "u"},
        {"_id": "d2", "title": "", "text": "Only text."},
        {"_id": 3, "title": "Only title", "text": ""},
    )
    assert load_corpus(BeirCorpusConfig(path=str(tmp_path))) == [
        KnowledgeNode("d1", "Title Text.", {"title": "Title", "url": "u"}),
        KnowledgeNode("d2", "Only text.", {"title": ""}),
        KnowledgeNode("3", "Only title", {"title": "Only title"}),
    ]


def test_bad_beir_corpus(tmp_path):
    write_jsonl(
        tmp_path / "corpus.jsonl", {"_id": "d1", "title": "", "text": ""}, {"text": "x"}, {"_id": "d1", "text": 1}
    )
    with pytest.raises(DataError) as caught:
        load_corpus(BeirCorpusConfig(path=str(tmp_path)))
    assert caught.value.message.splitlines()[1:] == [
        "corpus.jsonl:1: title and text is empty",
        "corpus.jsonl:2: has no '_id'",
        "corpus.jsonl:3: _id 'd1' is that of corpus.jsonl:1",
        "corpus.jsonl:3: title or text is not a text",
    ]
    with pytest.raises(DataError, match="is a file, but a folder is expected"):
        load_corpus(BeirCorpusConfig(path=str(tmp_path / "corpus.jsonl")))


def test_text_files_in_upper_case_and_behind_links(tmp_path, caplog):
    folder = tmp_path / "[x] * ?" / "docs"
    (folder / "sub" / ".cache").mkdir(parents=True)
    shared = tmp_path / "shared"
    shared.mkdir()
    for path in ("A.TXT", "sub/b.Md", "sub/.h.txt", "other.rst", "../../shared/c.markdown"):
        (folder / path).write_text("Text.", encoding="utf-8")
    (folder / "sub" / "linked").symlink_to(shared)
    (folder / "again").symlink_to(shared)
    (folder / "sub" / "round").symlink_to(folder)
    (folder / "up").symlink_to(tmp_path)
    (folder / "d.txt").symlink_to(shared / "c.markdown")
    (folder / "dead.txt").symlink_to(tmp_path / "nowhere")

    caplog.set_level("WARNING", logger="fedrag_cli")

    def found(*patterns):
        return [node.metadata["path"] for node in load_corpus(TextCorpusConfig(path=str(folder), patterns=patterns))]

    assert found("*.txt", "*.MD", "*.markdown") == ["A.TXT", "again/c.markdown", "d.txt", "sub/b.Md"]
    assert caplog.messages[0].partition(": ")[2].split("; ") == [
        "2 hidden ('sub/.cache', 'sub/.h.txt')",
        "1 that are no files or lead nowhere ('dead.txt')",
        "1 that fit no pattern ('other.rst')",
        "3 that links lead back to ('sub/linked', 'sub/round', 'up')",
    ]
    assert found("sub/*.md") == ["sub/b.Md"]
    assert found("**/sub/**/[ab].*") == ["sub/b.Md"]
    assert found("?.txt") == ["A.TXT", "d.txt"]
    for pattern in ("../*.txt", ""):
        with pytest.raises(ConfigError, match="cannot be used"):
            found(pattern)


def test_missing_titles_are_no_metadata(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("id,text,title\na,One.,None\nb,Two.,\nc,None,T\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"c.csv:4: text is missing \(null\)"):
        load_corpus(FileCorpusConfig(path=str(path)))
    nodes = load_corpus(FileCorpusConfig(path=str(path), limit=2))
    assert nodes == [KnowledgeNode("a", "One."), KnowledgeNode("b", "Two.", {"title": ""})]
    rows = [{"_id": "a", "text": "One.", "title": None}, {"_id": 7.0, "text": "Two.", "title": float("nan")}]
    write_jsonl(tmp_path / "corpus.jsonl", *rows)
    assert load_corpus(BeirCorpusConfig(path=str(tmp_path))) == [KnowledgeNode("a", "One."), KnowledgeNode("7", "Two.")]
    untitled = squad_file(tmp_path, {"title": None, "paragraphs": [{"context": "One.", "qas": []}]})
    assert load_corpus(SquadCorpusConfig(path=untitled)) == [KnowledgeNode("squad-0", "One.", {"title": "squad"})]


def test_names_that_no_system_takes_are_data_errors(tmp_path):
    for config in (TextCorpusConfig, FileCorpusConfig, SquadCorpusConfig, BeirCorpusConfig, HuggingFaceCorpusConfig):
        with pytest.raises(DataError, match="cannot be read: "):
            load_corpus(config(path=str(tmp_path / ("x" * 300))))
    (tmp_path / "a.txt").write_text("One.", encoding="utf-8")
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("Two.", encoding="utf-8")
    except OSError:
        pytest.skip("the file system takes names in UTF-8 only")
    with pytest.raises(DataError, match=r"'caf\\udce9.txt': has a name that is not UTF-8"):
        load_corpus(TextCorpusConfig(path=str(tmp_path)))
