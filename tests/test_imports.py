"""The house rules: who may import whom, no file asks which base it is, and how long files, functions and lines are."""

import ast
import functools
import sys

import pytest

from bases import nano, wan, wan22
from tests.common import ROOT

SEVEN = ["model", "encoder", "data", "pretrain", "finetune", "sample", "eval"]
ROOMS = ["bases", "dolls", "bench", "util"]
PACKAGES = {"torch", "einops", "numpy", "imageio", "tqdm", "safetensors"}  # what the seven may import
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(
        [*(ROOT / f"{name}.py" for name in SEVEN), *(p for r in ROOMS for p in (ROOT / r).rglob("*.py"))]
    )
}  # module -> file, without tests


@functools.cache
def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imported(module):
    """[(module, name or None)] of all import statements in a file, wherever they stand."""
    found = []
    for node in ast.walk(parse(FILES[module])):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: a relative import"
            found += [(node.module, alias.name) for alias in node.names]
    return found


def room(module):
    return module.partition(".")[0]


def is_ours(module):
    return room(module) in {*SEVEN, *ROOMS, "tests", "test_shapes"}


def is_allowed(importer, module, name):
    """May a file of the project have `import module` (name None) or `from module import name`?"""
    if importer in SEVEN:
        if room(module) == "bases":
            return (module, name) == ("bases", "open_base")
        if room(module) == "dolls":
            return importer == "data"
        return room(module) in {*SEVEN, "util", *PACKAGES, *sys.stdlib_module_names}
    if (importer, room(module)) in (("bases.codec", "dolls"), ("dolls.command", "bases")):  # scripts, imported by none
        return True
    allowed = {"util": {"util"}, "bases": {"bases", "model", "util"}, "dolls": {"dolls", "model", "util"}}
    return not is_ours(module) or room(importer) not in allowed or room(module) in allowed[room(importer)]


@pytest.mark.parametrize("importer", FILES)
def test_imports_follow_the_rules(importer):
    wrong = [(module, name) for module, name in imported(importer) if not is_allowed(importer, module, name)]
    assert not wrong, f"{importer} imports {wrong}"


def test_nothing_imports_in_a_circle():
    def targets(module):
        for target, name in imported(module):
            if f"{target}.{name}" in FILES:
                yield f"{target}.{name}"
            elif target in FILES:
                yield target

    done = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for target in targets(module):
                visit(target, [*path, module])
        done.add(module)

    for module in FILES:
        visit(module, [])


def test_no_file_asks_which_base_it_is():
    bases = {"wan", "dct", "hunyuan", *nano.PRESETS, *wan.PRESETS, *wan22.PRESETS} - {"tiny", "tiny-wan"}
    for module, path in FILES.items():
        if room(module) == "bases":
            continue
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq | ast.In | ast.NotIn):
                values = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert not values & bases, f"{path.name}, line {node.lineno}: {ast.unparse(node)}"


# ---------------------------------------------------------------------------------------------------------------------
# Lengths


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def test_the_seven_files_can_be_read_in_one_go():
    assert sum(len(lines(FILES[name])) for name in SEVEN) <= 2000


@pytest.mark.parametrize("module", FILES)
def test_files_and_functions_are_short(module):
    assert len(lines(FILES[module])) <= 400
    for node in ast.walk(parse(FILES[module])):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 50, f"{node.name} has {length} lines"


def test_all_files_and_their_lines_are_short():
    for path in sorted([*ROOT.glob("*.py"), *(p for r in (*ROOMS, "tests") for p in (ROOT / r).rglob("*.py"))]):
        assert len(lines(path)) <= 400, path.relative_to(ROOT)
        long = [n for n, line in enumerate(lines(path), 1) if len(line) > 120]
        assert not long, f"{path.relative_to(ROOT)}, lines {long}"


def test_the_readme_is_short():
    assert len(lines(ROOT / "README.md")) <= 200
