"""The tree keeps its shape: links, mirrored tests, short files and no model known by name."""

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

ROOT = Path(__file__).parents[1]
LINKED = ["passes", "patterns"]
MAX_LINES = 500

# Words that some model type starts with, and that say nothing of a model in code.
GENERIC = """
    align audio clip conditional data decision deformable depth diffusion dots encoder
    embedding encoder_decoder fast flex funnel mask perception prompt recurrent seed speech step
    switch table time video vision visual
"""


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


SOURCES = [*sources("moe_compile"), *sources("passes"), *sources("patterns")]


def family_names() -> set[str]:
    """Every model type of transformers, and the word it starts with: qwen3_moe, qwen."""
    types = {model_type.lower().replace("-", "_") for model_type in CONFIG_MAPPING}
    words = {re.split(r"[^a-z]", model_type)[0] for model_type in types}
    return {name for name in types | words if len(name) > 3} - set(GENERIC.split())


FAMILY = re.compile(rf"(?<![a-z])({'|'.join(sorted(family_names(), reverse=True))})(?![a-z])")


def code_tokens(source: str) -> Iterator[str]:
    """Every identifier and string literal; docstrings and comments are not code."""
    tree = ast.parse(source)
    docs = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node in docs:
            continue
        for _, value in ast.iter_fields(node):
            values: list[object] = value if isinstance(value, list) else [value]
            yield from (text for text in values if isinstance(text, str))


def families_in(source: str) -> set[str]:
    """The family names in code, read word by word: Qwen3MoeExperts is qwen3_moe_experts."""
    words = (re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", token).lower() for token in code_tokens(source))
    return {match[0] for word in words for match in FAMILY.finditer(word)}


@pytest.mark.parametrize("name", LINKED)
def test_link_is_relative_and_resolves(name: str) -> None:
    link = ROOT / "moe_compile" / name
    assert link.readlink() == Path("..") / name
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", LINKED)
def test_linked_modules_have_one_name(name: str) -> None:
    for path in (ROOT / name).glob("*.py"):
        module = importlib.import_module(f"moe_compile.{name}.{path.stem}")
        classes = [value for value in vars(module).values() if isinstance(value, type)]
        assert not [kind for kind in classes if kind.__module__.startswith(f"{name}.")]
    assert name not in sys.modules


@pytest.mark.parametrize("name", LINKED)
def test_every_file_has_its_test(name: str) -> None:
    stems = {path.stem for path in (ROOT / name).glob("*.py")} - {"__init__"}
    tests = {path.stem for path in (ROOT / "tests" / name).glob("test_*.py")}
    assert {f"test_{stem}" for stem in stems} <= tests


def test_files_are_short() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in SOURCES}
    assert not {path: count for path, count in lines.items() if count > MAX_LINES}


def test_no_code_names_a_model_family() -> None:
    named = {str(path.relative_to(ROOT)): families_in(path.read_text()) for path in SOURCES}
    assert not {path: names for path, names in named.items() if names}


ADAPTERS = [path for path in SOURCES if path.parent.name == "adapters"]


def imported(source: str) -> set[str]:
    """The packages that a file imports, at any depth of its code."""
    nodes = [*ast.walk(ast.parse(source))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def test_adapters_alone_know_transformers() -> None:
    knowing = {path for path in SOURCES if "transformers" in imported(path.read_text())}
    assert knowing
    assert knowing <= set(ADAPTERS)


def test_private_names_of_transformers_are_in_adapters_and_listed_there() -> None:
    kinds = (PreTrainedModel, PreTrainedConfig)
    own = {n for kind in kinds for n in dir(kind)} - {*dir(nn.Module), *dir(object)}
    private = {n for n in own if n.startswith("_") and not n.startswith("__")}
    used = {path: private & set(code_tokens(path.read_text())) for path in SOURCES}
    assert not {path: names for path, names in used.items() if names and path not in ADAPTERS}
    for path in ADAPTERS:
        listed = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert not {name for name in used[path] if name not in listed}, path


@pytest.mark.parametrize(
    "source",
    ["class Qwen3MoeExperts: ...", "is_mixtral = 1", "x = 'DeepseekV3Layer'", "def f(llama4): ..."],
)
def test_families_are_found_in_code(source: str) -> None:
    assert families_in(source)


@pytest.mark.parametrize(
    "source",
    ['"""As in Mixtral."""', "x = 1  # as in Qwen3", "clip_grad_norm_(variant, aligned, encoder)"],
)
def test_docs_and_plain_words_name_no_family(source: str) -> None:
    assert not families_in(source)
