"""The documents: links lead somewhere, and what the README says is where it says."""

import ast
import re

import pytest

from tests.common import ROOT

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
