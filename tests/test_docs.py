"""Every block of code on the documentation site runs: Python, commands, settings, the notebook."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from sybil import Example
from sybil.document import Document
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from browser import content_without_complaint
from vitmix.cli import COMMANDS, main
from vitmix.evaluate.study import read_study
from vitmix.options import Parser

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
OVERRIDES = [  # for commands that are run: no download, a small model, one epoch
    "--pretrained", "false", "--img-size", "32", "--epochs", "1", "--threads", "1",
    "--device", "cpu", "--batch-size", "16", "--workers", "0",
    "--model-kwargs", "{patch_size: 8, depth: 2, embed_dim: 48, num_heads: 3}",
]  # fmt: skip


def commands(text: str) -> list[list[str]]:
    """The words of each command in shell lines; comments and the rest of pipes left out."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words]


def check_commands(example: Example) -> None:
    """A command of vitmix must parse; a script of the repository that is called must be there."""
    for words in commands(example.parsed):
        for word in words:
            if re.fullmatch(r"(benchmarks|examples|tests)/[\w/-]+\.py", word):
                assert (ROOT / word).is_file(), f"there is no {word}"
        place = next((n for n, word in enumerate(words) if word in ("vitmix", "vitmix.cli")), None)
        if place is None:
            continue
        name, *arguments = (word for word in words[place + 1 :] if word != "...")
        if ">" in arguments:
            arguments = arguments[: arguments.index(">")]
        assert name in COMMANDS, f"vitmix has no command {name}"
        parser = Parser(f"vitmix {name}", COMMANDS[name].summary, COMMANDS[name].example)
        COMMANDS[name].configure(parser)
        parser.parse(arguments)


def check_settings(example: Example) -> None:
    """A file of settings must be understood by ``vitmix train --config``; a study by its reader."""
    command = COMMANDS["train"]
    parser = Parser("vitmix train", command.summary, command.example)
    command.configure(parser)
    Path("settings.yaml").write_text(example.parsed)
    given: dict[str, Any] = yaml.safe_load(example.parsed)
    if "cells" in given:
        read_study("settings.yaml")
        return
    settings = parser.parse(["--config", "settings.yaml"])
    assert {key: settings[key] for key in given} == given


PARSERS = (
    PythonCodeBlockParser(),
    CodeBlockParser("sh", check_commands),
    CodeBlockParser("yaml", check_settings),
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
@pytest.mark.filterwarnings("ignore")
def test_blocks_of_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after another; they may take a model and a batch as given."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    document = Document.parse(str(page), *PARSERS)
    document.namespace |= {
        "model": timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=4, depth=4, num_classes=10
        ),
        "images": torch.rand(8, 3, 32, 32),
        "targets": torch.randint(10, (8,)),
    }
    for example in document.examples():
        example.evaluate()


def test_commands_and_settings_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    examples = list(Document.parse(str(ROOT / "README.md"), *PARSERS[1:]).examples())
    assert len(examples) > 3
    for example in examples:
        example.evaluate()


def test_a_block_that_is_wrong_is_seen(tmp_path: Path) -> None:
    for text in (
        "```python\n1 / 0\n```",
        "```sh\nvitmix trian\n```",
        "```sh\nvitmix train -x\n```",
    ):
        (tmp_path / "page.md").write_text(text)
        (example,) = Document.parse(str(tmp_path / "page.md"), *PARSERS).examples()
        with pytest.raises(Exception, match=r"division|trian|-x"):
            example.evaluate()


@pytest.mark.filterwarnings("ignore")
def test_four_commands_from_the_first_page_to_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They work one after another on a folder of images; those of the tutorial are the same."""
    monkeypatch.chdir(tmp_path)
    tutorial = DOCS / "tutorials" / "folder.md"
    for example in Document.parse(str(tutorial), PythonCodeBlockParser()).examples():
        example.evaluate()  # makes the folder of images
        if Path("pictures").is_dir():
            break
    blocks: dict[str, list[list[str]]] = {}
    for page in (DOCS / "index.md", tutorial):
        text = re.search(r"```sh\n(pip.*?)```", page.read_text(), re.DOTALL)
        assert text is not None
        blocks[page.name] = commands(text[1])
    four = blocks["index.md"]
    assert four == blocks["folder.md"]
    assert len(four) == 4
    assert four[0][:2] == ["pip", "install"]
    for _, name, *arguments in four[1:]:
        assert main([name, *arguments, *(OVERRIDES if name == "train" else [])]) == 0
        capsys.readouterr()
    assert Path("report.html").stat().st_size > 10_000
    weights: dict[str, Any] = {
        "img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3,
        "num_classes": 10, "checkpoint_path": "pictures.safetensors",
    }  # fmt: skip
    assert timm.create_model("vit_small_patch16_224", **weights)(torch.rand(1, 3, 32, 32)).shape


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Links, references of docstrings and pages outside of every table of contents included."""
    pytest.importorskip("myst_nb")
    pytest.importorskip("latex2mathml")
    command = [sys.executable, "-m", "sphinx", "-n", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, str(DOCS), str(tmp_path / "html")],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for page in ("index.html", "methods/tokenmixup.html", "tutorials/inside.html"):
        text = (tmp_path / "html" / page).read_text()
        assert not re.findall(r"(?:src|href)=\"(?:https?:)?//[^\"]*\.(?:js|css|woff2?)", text)
    first = content_without_complaint(tmp_path / "html" / "index.html", tmp_path / "browser")
    assert "MixingModel" in first


@pytest.mark.filterwarnings("ignore")
def test_notebook_runs(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    notebook = nbformat.read(DOCS / "tutorials" / "inside.ipynb", as_version=4)
    client.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    pictures = [
        output
        for cell in notebook.cells if cell.cell_type == "code"
        for output in cell.outputs if "image/png" in output.get("data", {})
    ]  # fmt: skip
    assert pictures
