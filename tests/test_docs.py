"""The documents: links lead somewhere, and what the README says is where it says."""

import ast
import re
import shutil
import subprocess
import sys

import pytest

import finetune
import pretrain
import sample
from bases import codec
from bench import gpu
from tests.common import ROOT, script
from util.cli import Parser

DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"https?:", target):
            continue
        file = (document.parent / path) if path else document
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings], target


def defined_names(path):
    """Functions, classes and methods (Class.method) of a file."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
    return names


def test_the_methods_table_names_what_is_there():
    rows = re.findall(r"^\| .* \| (\w+\.py), `([\w.]+)`(?:: `(.*)`)? \|$", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) == 8
    for file, name, code in rows:
        assert name in defined_names(ROOT / file), (file, name)
        assert code in (ROOT / file).read_text(encoding="utf-8"), (file, code)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_documents_name_exist(document):
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for name in re.findall(r"`?((?:\w+/)*\w+\.py)\b`?", text):
        assert list(ROOT.glob(f"**/{name}")), f"{document.name} names {name}"


# ---------------------------------------------------------------------------------------------------------------------
# Commands

# a shell in which python and torchrun print their arguments, and nothing else does anything
SHELL = r"""PATH=/nowhere
python() { printf '%s\0' "$@" $'\n'; }
torchrun() { python "${@:2}"; }
cd() { :; }
command_not_found_handle() { :; }
"""
MAINS = {
    "pretrain.py": pretrain.main,
    "finetune.py": finetune.main,
    "sample.py": sample.main,
    "data.py": script("data"),
    "eval.py": script("eval"),
    "bases.codec": codec.main,
    "bench.gpu": gpu.main,
}


class Parsed(Exception):
    """Raised with the flags of a command, once they are read."""


def commands(document):
    """[[script, argument, ...]] of all commands of a document's shell blocks, as a shell would start them."""
    blocks = re.findall(r"^ *```sh\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL | re.M)
    done = subprocess.run(["bash", "-c", SHELL + "".join(blocks)], capture_output=True, text=True, check=True)
    started = [command.split("\0")[:-1] for command in done.stdout.split("\n\0")[:-1]]
    started = [command[1:] if command[0] == "-m" else command for command in started]
    return [command for command in started if command[0] != "pytest"]


def read_flags(command, monkeypatch):
    """The flags of a command, read by its script. Raises UserError."""
    read = Parser.parse_known_args

    def parse(parser, argv):
        known, unknown = read(parser, argv)
        if unknown:
            return known, unknown  # which is refused
        raise Parsed(known)

    with monkeypatch.context() as m:
        m.setattr(Parser, "parse_known_args", parse)
        m.setattr(sys, "argv", command)
        with pytest.raises(Parsed) as found:
            MAINS[command[0]]()
    return found.value.args[0]


needs_bash = pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")


@needs_bash
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_of_documents_have_flags_that_exist(document, monkeypatch):
    for command in commands(document):
        read_flags(command, monkeypatch)


@needs_bash
def test_the_tables_take_their_memory_from_runs_that_match(monkeypatch):
    """Every φ that a command of results.md starts from is of a run made before, of the same method, rate and seed."""
    runs, taken = {}, 0
    for command in commands(ROOT / "docs" / "results.md"):
        flags = read_flags(command, monkeypatch)
        if command[0] in ("pretrain.py", "finetune.py"):
            assert flags.out not in runs, f"{flags.out} is made twice"
            runs[flags.out] = flags
        if command[0] == "finetune.py" and flags.encoder.startswith("runs/t1"):
            theirs, taken = runs[flags.encoder], taken + 1
            assert (flags.method, flags.rate, flags.seed) == (theirs.method, theirs.rate, theirs.seed), command
    assert taken > 10
