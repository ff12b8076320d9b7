from __future__ import annotations

from pathlib import Path

import pytest

from fedrag_cli.config import Config, load_config, load_config_with_source
from fedrag_cli.config.problems import InvalidConfigError
from fedrag_cli.errors import EXIT_USAGE, ConfigError

MINIMAL = """\
rag_system:
  retriever:
    model: org/retriever
  generator:
    model: org/generator
dataset:
  corpus:
    path: corpus.jsonl
  train:
    path: train.jsonl
"""


def write(path: Path, text: str, *, base: str = MINIMAL) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(base + text, encoding="utf-8")
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    """Return what is wrong with a config, with the bare file names."""
    with pytest.raises(InvalidConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == EXIT_USAGE
    return [str(problem).replace(f"{path.parent}/", "") for problem in caught.value.problems]


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "c.yaml", ""))
    assert isinstance(config, Config)
    assert (config.run.seed, config.trainer.mode, config.rag_system.top_k) == (42, "retriever", 3)
    assert config.trainer.retriever.type == "lsr"
    assert config.trainer.generator.lora.r == 16
    assert config.rag_system.knowledge_store.type == "memory"


def test_fedrag_yaml_in_the_current_folder_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "fedrag.yaml", "run: {name: here}\n")
    monkeypatch.chdir(tmp_path)
    config = load_config()
    assert config.run.name == "here"
    assert config.dataset.corpus.path == str(tmp_path / "corpus.jsonl")


def test_command_line_beats_yaml_beats_default(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "run: {seed: 7, name: yaml}\n")
    config = load_config(path, ["run.name=line"])
    assert (config.run.name, config.run.seed, config.run.device) == ("line", 7, "auto")


def test_later_overrides_win_and_lists_are_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "evaluation: {metrics: [mrr, f1, recall@5]}\n")
    overrides = ["evaluation.metrics=[mrr]", "run.seed=1", "run.seed=2", "evaluation.metrics=[ndcg@10, hit@1]"]
    config = load_config(path, overrides)
    assert config.evaluation.metrics == ("ndcg@10", "hit@1")
    assert config.run.seed == 2


def test_override_values_are_yaml(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "")
    overrides = [
        "trainer.generator.lora=null",
        "trainer.generator.learning_rate=1e-5",
        "run.name='3'",
        "run.device=cpu",
    ]
    config = load_config(path, [*overrides, "dataset.test={path: t.jsonl, limit: 3}"])
    assert config.trainer.generator.lora is None
    assert config.trainer.generator.learning_rate == 1e-5
    assert config.run.name == "3"
    assert config.dataset.test.limit == 3


@pytest.mark.parametrize("override", ["run.name", "=3", " =3"])
def test_malformed_override(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"is no override") as caught:
        load_config(write(tmp_path / "c.yaml", ""), [override])
    assert "trainer.mode=generator" in caught.value.hint


def test_override_that_is_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"The override 'run\.name=\[' cannot be read: "):
        load_config(write(tmp_path / "c.yaml", ""), ["run.name=["])


def test_extends_chain_merges_from_the_far_end(tmp_path: Path) -> None:
    write(tmp_path / "far" / "base.yaml", "run: {name: far, seed: 1, device: cpu}\n")
    write(tmp_path / "near" / "middle.yaml", "run: {name: middle, seed: 2}\n", base="extends: ../far/base.yaml\n")
    top = write(tmp_path / "top.yaml", "run: {name: top}\n", base="extends: near/middle.yaml\n")
    config = load_config(top)
    assert (config.run.name, config.run.seed, config.run.device) == ("top", 2, "cpu")


def test_paths_count_from_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "base" / "base.yaml", "run: {output_dir: out}\n")
    child = "dataset: {train: {path: ./mine.jsonl}, test: {path: ../test.jsonl}}\n"
    top = write(tmp_path / "child" / "top.yaml", child, base="extends: ../base/base.yaml\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_config(top, ["dataset.validation.path=typed.jsonl"])
    assert config.dataset.corpus.path == str(tmp_path / "base" / "corpus.jsonl")
    assert config.dataset.train.path == str(tmp_path / "child" / "mine.jsonl")
    assert config.dataset.test.path == str(tmp_path / "test.jsonl")
    assert config.dataset.validation.path == str(elsewhere / "typed.jsonl")
    assert config.run.output_dir == str(elsewhere / "out")


def test_path_in_a_whole_section_from_the_command_line_counts_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "configs" / "c.yaml", "")
    monkeypatch.chdir(tmp_path)
    config = load_config(path, ["dataset.train={path: typed.jsonl}"])
    assert config.dataset.train.path == str(tmp_path / "typed.jsonl")


def test_paths_of_a_referenced_section_count_from_the_file_that_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "base" / "base.yaml", "")
    child = "dataset: {validation: '${dataset.train}', test: {path: '${dataset.train.path}'}}\n"
    top = write(tmp_path / "child" / "top.yaml", child, base="extends: ../base/base.yaml\n")
    monkeypatch.chdir(tmp_path)
    config = load_config(top)
    expected = str(tmp_path / "base" / "train.jsonl")
    assert (config.dataset.train.path, config.dataset.validation.path, config.dataset.test.path) == (expected,) * 3


def test_models_existing_folders_become_absolute_and_hub_ids_stay(tmp_path: Path) -> None:
    (tmp_path / "org" / "local").mkdir(parents=True)
    text = """\
rag_system:
  retriever: {query_model: org/local, passage_model: ./not-there-yet}
  generator: {model: org/hub}
dataset: {corpus: {path: /data/corpus.jsonl}}
"""
    path = write(tmp_path / "c.yaml", text, base="")
    config = load_config(path)
    assert config.rag_system.retriever.query_model == str(tmp_path / "org" / "local")
    assert config.rag_system.retriever.passage_model == str(tmp_path / "not-there-yet")
    assert config.rag_system.generator.model == "org/hub"
    assert config.dataset.corpus.path == "/data/corpus.jsonl"
    overrides = ["rag_system.generator.model=package://name/org/local"]
    assert load_config(path, overrides).rag_system.generator.model == "package://name/org/local"
    overrides = ["rag_system.generator.model=weights.gguf"]
    assert load_config(path, overrides).rag_system.generator.model == str(Path.cwd() / "weights.gguf")


def test_extends_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "", base="extends: b.yaml\n")
    path = write(tmp_path / "b.yaml", "", base="extends: a.yaml\n")
    with pytest.raises(ConfigError, match=r"'extends' goes in a circle: .*b\.yaml -> .*a\.yaml -> .*b\.yaml"):
        load_config(path)


@pytest.mark.parametrize("value", ["[a.yaml, b.yaml]", "3"])
def test_extends_must_be_one_path(tmp_path: Path, value: str) -> None:
    path = write(tmp_path / "c.yaml", f"extends: {value}\n")
    assert problems(path) == ["c.yaml:11: extends: must be the path of one YAML file"]


def test_missing_base(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "", base="extends: nowhere.yaml\n")
    with pytest.raises(ConfigError, match=rf"There is no config file '{tmp_path}/nowhere\.yaml'"):
        load_config(path)


def test_errors_in_a_base_are_reported_in_that_file(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "run:\n  sed: 3\n")
    path = write(tmp_path / "c.yaml", "run:\n  nme: x\n", base="extends: base.yaml\n")
    assert problems(path) == [
        "base.yaml:12: run.sed: is no setting here (did you mean 'seed'?)",
        "c.yaml:3: run.nme: is no setting here (did you mean 'name'?)",
    ]


def test_another_type_in_an_extending_file_drops_the_old_settings(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "  test: {type: file, path: test.csv, list_separator: ';'}\n")
    path = write(tmp_path / "c.yaml", "dataset: {test: {type: squad, path: s.json}}\n", base="extends: base.yaml\n")
    test = load_config(path).dataset.test
    assert (test.type, test.path, test.limit) == ("squad", str(tmp_path / "s.json"), None)


def test_another_type_drops_the_settings_of_the_default_type_too(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "  test: {path: test.csv, columns: {query: q}}\n")
    test = load_config(path, ["dataset.test.type=squad", "dataset.test.path=/s.json"]).dataset.test
    assert (test.type, test.path) == ("squad", "/s.json")
    assert problems(path, "dataset.test.type=squad") == [
        "command line (dataset.test.type=squad): dataset.test.path: is required (the change of type dropped the former "
        "path)"
    ]


def test_naming_the_same_type_keeps_the_settings(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "  test: {path: test.csv, columns: {query: q}}\n")
    test = load_config(path, ["dataset.test.type=file"]).dataset.test
    assert (test.path, test.columns.query) == (str(tmp_path / "test.csv"), "q")


def test_references_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDRAG_TEST_SEED", "17")
    text = "run: {name: 'r-${trainer.mode}', seed: '${oc.env:FEDRAG_TEST_SEED}'}\ntrainer: {mode: generator}\n"
    config = load_config(write(tmp_path / "c.yaml", text), ["evaluation.limit=${run.seed}"])
    assert (config.run.name, config.run.seed, config.evaluation.limit) == ("r-generator", 17, 17)


def test_environment_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDRAG_TEST_NOPE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "c.yaml", "run: {name: '${oc.env:FEDRAG_TEST_NOPE,other}'}\n")
    assert load_config(path).run.name == "other"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("${oc.env:FEDRAG_TEST_NOPE}", "the environment variable 'FEDRAG_TEST_NOPE' is not set"),
        ("a-${oc.env:FEDRAG_TEST_NOPE}-b", "the environment variable 'FEDRAG_TEST_NOPE' is not set"),
        ("${run.nope}", "refers to 'run.nope', which the config does not set"),
        ("${.nope}", "refers to '.nope', which the config does not set"),
        ("a ${run.nope} b", "refers to 'run.nope', which the config does not set"),
        ("${nope[0].x}-b", "refers to 'nope[0].x', which the config does not set"),
        (
            "a ${HOME}",
            "refers to 'HOME', which the config does not set (write ${oc.env:HOME} for the environment variable)",
        ),
        ("a ${federated.rounds}", "refers to 'federated.rounds', which the config does not set"),
        ("a ${....x}", "refers to '....x', which leads out of the config"),
        ("${run.name}", "refers to itself"),
        ("a ${run.name}", "refers to itself"),
        ("${foo:bar}", "has the unknown resolver 'foo' (write ${oc.env:NAME} for an environment variable)"),
        ("???", "has no value yet ('???')"),
        (
            "${oc.env:",
            "is a broken reference (write ${oc.env:NAME} or ${section.key}, and \\${ for the characters)",
        ),
    ],
)
def test_failing_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    monkeypatch.delenv("FEDRAG_TEST_NOPE", raising=False)
    path = write(tmp_path / "c.yaml", f"run:\n  seed: 3\n  name: '{value}'\n")
    assert problems(path) == [f"c.yaml:13: run.name: {message}"]


def test_all_failing_references_are_reported_beside_other_errors_in_the_order_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOPE_1", raising=False)
    monkeypatch.delenv("NOPE_2", raising=False)
    text = """\
run:
  seed: -1
  name: ${oc.env:NOPE_1}
trainer:
  retriever:
    type: ${oc.env:NOPE_2}
  mode: retriver
"""
    assert problems(write(tmp_path / "c.yaml", text)) == [
        "c.yaml:12: run.seed: must be greater than or equal to 0, not -1",
        "c.yaml:13: run.name: the environment variable 'NOPE_1' is not set",
        "c.yaml:16: trainer.retriever.type: the environment variable 'NOPE_2' is not set",
        "c.yaml:17: trainer.mode: 'retriver' is not one of retriever, generator, alternating "
        "(did you mean 'retriever'?)",
    ]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no config file '.*none\.yaml'") as caught:
        load_config(tmp_path / "none.yaml")
    assert caught.value.hint == "Give the path of a YAML file, or make one with 'fedrag init DIR'."


def test_folder_instead_of_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: .*Is a directory"):
        load_config(tmp_path)


def test_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"c\.yaml' is not UTF-8 text: the byte 0xff at offset 0 cannot be"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "c.yaml:1: holds no settings (expected 'key: value' lines)"),
        ("# nothing\n", "c.yaml:1: holds no settings (expected 'key: value' lines)"),
        ("- run\n- trainer\n", "c.yaml:1: holds no settings (expected 'key: value' lines)"),
        ("just words\n", "c.yaml:1: holds no settings (expected 'key: value' lines)"),
        ("run:\n\tname: x\n", "c.yaml:2: is no YAML: found character that cannot start any token"),
        ("run: {name: x\ntrainer: y\n", "c.yaml:2: is no YAML: did not find expected ',' or '}'"),
        ("run:\n  name: a\n  seed: 1\n  name: b\n", "c.yaml:4: is no YAML: found duplicate key name"),
        ("run: {}\ndataset: {}\nrun: {}\n", "c.yaml:3: is no YAML: found duplicate key run"),
        ("run:\n  name: {{ jinja }}\n", "c.yaml:2: is no YAML: found unhashable key"),
        ("run: 1\n---\nrun: 2\n", "c.yaml:2: is no YAML: but found another document"),
        ("run: &a\n  name: *a\n", "c.yaml:1: is no YAML: YAML recursive aliases are not supported."),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, problem: str) -> None:
    assert problems(write(tmp_path / "c.yaml", text, base="")) == [problem]


def test_saved_data_sets_become_absolute_and_hub_ids_stay(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    text = "  test: {type: huggingface, path: saved}\n  validation: {type: huggingface, path: org/set}\n"
    dataset = load_config(write(tmp_path / "c.yaml", text)).dataset
    assert (dataset.test.path, dataset.validation.path) == (str(tmp_path / "saved"), "org/set")


def test_references_to_settings_that_nobody_sets_give_their_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDRAG_TEST_MANNER", "kind")
    text = """\
rag_system:
  top_k: ${rag_system.retriever.batch_size}
  prompt: {system: 'in ${run.name} be ${oc.env:FEDRAG_TEST_MANNER}, ${trainer.retriever.epochs} \\${HOME} ${.template}'}
evaluation: {metrics: ["recall@${evaluation.resamples}"], confidence: "${trainer.generator.lora.dropout}"}
trainer: {generator: {lora: {dropout: 0.6}}}
"""
    base = "rag_system: {retriever: {model: org/r}}\ndataset: {corpus: {path: c.jsonl}}\n"
    path = write(tmp_path / "c.yaml", "extends: base.yaml\n" + text, base="")
    (tmp_path / "base.yaml").write_text(base, encoding="utf-8")
    source = load_config_with_source(path)
    default = Config(rag_system=source.config.rag_system, dataset=source.config.dataset)
    assert source.config.rag_system.top_k == 64
    begin = f"in {default.run.name} be kind, {default.trainer.retriever.epochs} ${{HOME}} "
    system, template = source.config.rag_system.prompt.system, source.config.rag_system.prompt.template
    assert system == begin + template
    assert source.config.evaluation.metrics == (f"recall@{default.evaluation.resamples}",)
    assert source.config.evaluation.confidence == 0.6
    written = tmp_path / "written.yaml"
    written.write_text(source.to_yaml(), encoding="utf-8")
    assert "kind" not in source.to_yaml()
    assert load_config(written).rag_system.prompt == source.config.rag_system.prompt


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: " + "[" * 3000 + "]" * 3000, "c.yaml:11: is no YAML: exceeded maximum nesting depth"),
        ("run: {name: " + "[" * 60 + "]" * 60 + "}", "c.yaml:11: run.name" + "[0]" * 31 + ": is nested too deeply"),
        ("extends: '${oc.env:FEDRAG_TEST_NOPE}'", "the environment variable 'FEDRAG_TEST_NOPE' is not set"),
        ("extends: ${run.nope}", "c.yaml:11: extends: refers to 'run.nope', which the config does not set"),
        ('extends: "a\\0b"', "c.yaml:11: extends: must be the path of one YAML file"),
        ("run: {name: b}\nrun: {name: c}", "c.yaml:12: is no YAML: found duplicate key run"),
        ("a: &a [*a]", "c.yaml:11: is no YAML: YAML recursive aliases are not supported."),
    ],
    ids=["deep", "deep value", "variable", "reference", "NUL", "duplicate", "circle"],
)
def test_files_that_are_odd_in_other_ways(tmp_path: Path, text: str, problem: str) -> None:
    found = problems(write(tmp_path / "c.yaml", text + "\n"))
    assert any(problem in line for line in found), found


def test_an_override_deeper_than_any_setting(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "")
    with pytest.raises(ConfigError, match="is nested too deeply"):
        load_config(path, ["run.name=" + "[" * 60 + "]" * 60])
    with pytest.raises(ConfigError, match="is nested too deeply"):
        load_config(path, ["run." + "a." * 2000 + "b=3"])
    with pytest.raises(ConfigError, match="Cannot merge incompatible container types"):
        load_config(path, ["rag_system.retriever=[]"])


def test_links_in_a_circle_are_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "one")
    config = load_config(write(tmp_path / "c.yaml", ""), [f"run.output_dir={tmp_path / 'one'}"])
    assert config.run.output_dir == str(tmp_path / "one")
