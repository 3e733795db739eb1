"""Holds the house: who may import whom, how long things may get, what must not be in the tree. The rules are told in docs/architecture.md."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
ROOMS = [
    *("errors", "log", "config", "parallel", "runtime", "kernels", "conversion", "families", "templates", "data", "objectives", "tuners", "engines"),
    *("train", "rollout", "serve", "plan", "commands", "launch", "cli"),
]
"""A room imports only from those before it; launch and commands do not know each other."""
WITHOUT_TORCH = ("errors", "log", "config", "templates", "plan", "commands", "launch", "cli")
"""Not when they are imported: `mswift --help` and a wrong flag have to answer at once."""
HEAVY = {"torch", "transformers", "megatron", "datasets", "matplotlib"}
OPTIONAL = {
    *("vllm", "gradio", "modelopt", "bitsandbytes", "evalscope", "modelscope", "datasets", "peft", "gguf", "accelerate", "transformer_engine"),
    *("apex", "hypothesis", "pytest"),
}
MAY_PATCH = "mswift/runtime/cpu.py"


@functools.cache
def trees(folder: str = "mswift") -> dict[str, ast.Module]:
    """Path from the root -> syntax tree, for every Python file of a folder."""
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf8")) for path in sorted((ROOT / folder).rglob("*.py"))}


def nodes(*kinds: type[ast.AST], folder: str = "mswift") -> Iterator[tuple[str, ast.AST]]:
    return ((path, node) for path, tree in trees(folder).items() for node in ast.walk(tree) if isinstance(node, kinds))


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported module, and ``module.name`` for each name taken from one, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def when_imported(tree: ast.Module) -> ast.Module:
    """What of a module runs when it is imported: no function bodies, nothing for type checkers only."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Strip().visit(ast.parse(ast.unparse(tree)))


def module_name(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def percentile(values: list[int], share: float) -> int:
    return sorted(values)[round(share * (len(values) - 1))]


def test_every_room_is_known_and_imports_only_from_those_above() -> None:
    faults, rooms = [], set()
    for path, tree in trees().items():
        room = module_name(path).split(".")[1] if path != "mswift/__init__.py" else ROOMS[0]
        rooms.add(room)
        for target, line in imports(tree):
            parts = target.split(".")
            if parts[0] == "mswift" and parts[1] in ROOMS and ROOMS.index(parts[1]) > ROOMS.index(room):
                faults.append(f"{path}:{line} imports {target}")
        assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree)), f"{path}: imports are absolute here"
    assert rooms <= set(ROOMS)
    assert len(rooms) > 10
    assert not faults


def test_no_import_cycle() -> None:
    names = {module_name(path) for path in trees()}
    graph = {}
    for path, tree in trees().items():
        targets = {target for target, _ in imports(when_imported(tree))}
        graph[module_name(path)] = {target if target in names else target.rpartition(".")[0] for target in targets} & names
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) == names
    assert sum(map(len, graph.values())) > 100, "edges were found"


def test_light_rooms_do_without_torch() -> None:
    for path, tree in trees().items():
        room = module_name(path).split(".")[1] if path != "mswift/__init__.py" else "errors"
        if room in WITHOUT_TORCH:
            assert not {target.split(".")[0] for target, _ in imports(when_imported(tree))} & HEAVY, path
        if room == "data" and path != "mswift/data/batches.py":
            assert "torch" not in {target.split(".")[0] for target, _ in imports(when_imported(tree))}, path
    assert any(module_name(path).startswith("mswift.data.batches") for path in trees())


IMPORT_ALL = """
import importlib, pkgutil, sys
from importlib.machinery import PathFinder

class Hide:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in hidden else PathFinder.find_spec(name, path, target)

hidden = set(sys.argv[1].split(","))
sys.meta_path[:] = [Hide if finder is PathFinder else finder for finder in sys.meta_path]
import mswift
names = [module.name for module in pkgutil.walk_packages(mswift.__path__, "mswift.")]
for name in names:
    importlib.import_module(name)
print(len(names), sorted(hidden & {name.split(".")[0] for name in sys.modules}))
"""


def test_every_module_imports_with_the_core_dependencies_alone() -> None:
    command = [sys.executable, "-c", IMPORT_ALL, ",".join(sorted(OPTIONAL))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    count, loaded = done.stdout.splitlines()[-1].split(maxsplit=1)
    assert int(count) == len(trees()) - 1, "all but mswift itself"
    assert loaded == "[]"


def test_files_and_functions_are_short() -> None:
    lines = {path: len((ROOT / path).read_text(encoding="utf8").splitlines()) for path in trees()}
    assert percentile(list(lines.values()), 0.95) <= 500
    assert max(lines.values()) <= 800, max(lines, key=lines.__getitem__)
    lengths = {f"{path}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1 for path, node in nodes(ast.FunctionDef, ast.AsyncFunctionDef)}
    assert median(lengths.values()) <= 15
    assert percentile(list(lengths.values()), 0.95) <= 60
    assert max(lengths.values()) <= 120, max(lengths, key=lengths.__getitem__)


def test_arguments_are_annotated_and_classes_have_few_fields() -> None:
    arguments = [
        argument
        for _, node in nodes(ast.FunctionDef, ast.AsyncFunctionDef)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        if argument.arg not in ("self", "cls")
    ]
    assert sum(argument.annotation is not None for argument in arguments) >= 0.95 * len(arguments)
    fields = {f"{path} {node.name}": sum(isinstance(entry, ast.AnnAssign) for entry in node.body) for path, node in nodes(ast.ClassDef)}
    assert max(fields.values()) <= 25, max(fields, key=fields.__getitem__)
    calls = [node.func.id for _, node in nodes(ast.Call) if isinstance(node.func, ast.Name)]
    code = sum(bool(line.strip()) for path in trees() for line in (ROOT / path).read_text(encoding="utf8").splitlines())
    assert sum(call in ("getattr", "hasattr", "setattr") for call in calls) <= 2 * code / 1000


def test_nothing_is_assigned_onto_another_library() -> None:
    faults = []
    for path, tree in trees().items():
        names = {target.rpartition(".")[2] for target, _ in imports(tree)} | {target.split(".")[0] for target, _ in imports(tree)}
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else []
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
                targets = [ast.Attribute(node.args[0])]
            for target in targets:
                inner = target
                while isinstance(inner, ast.Attribute):
                    inner = inner.value
                if isinstance(target, ast.Attribute) and isinstance(inner, ast.Name) and inner.id in names:
                    faults.append((path, ast.unparse(inner)))
    assert {path for path, _ in faults} <= {MAY_PATCH}, faults
    assert faults, "the CPU runtime is where it happens"


def test_no_handler_hides_an_error() -> None:
    count = 0
    for path, node in nodes(ast.ExceptHandler):
        count += 1
        assert node.type is not None, f"{path}:{node.lineno} catches everything"
        if {"Exception", "BaseException"} & set(re.findall(r"\w+", ast.unparse(node.type))):
            passed_on = any(isinstance(inner, ast.Raise) or (isinstance(inner, ast.Name) and inner.id == node.name) for inner in ast.walk(node))
            assert passed_on, f"{path}:{node.lineno} keeps an error to itself"
    assert count > 10


def test_tests_assert_enough() -> None:
    tests = asserts = 0
    for path, node in nodes(ast.FunctionDef, ast.Assert, ast.Call, folder="tests"):
        if Path(path).name.startswith("test_"):
            tests += isinstance(node, ast.FunctionDef) and node.name.startswith("test")
            asserts += isinstance(node, ast.Assert)
            asserts += isinstance(node, ast.Call) and re.search(r"assert|\.raises$|\.warns$", ast.unparse(node.func)) is not None
    assert tests > 100
    assert asserts >= 2.5 * tests


def tracked_files() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_registry_or_a_place_of_one_machine() -> None:
    registry = re.compile(r"\b(?:pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)|download\.pytorch\.org|deb\.debian\.org|mirrors?\.\w+\.\w+)\b")
    place = re.compile(r"(?<![\w.$}/-])/(?:work|root|opt|home|Users|tmp)/\w")
    files = tracked_files()
    assert len(files) > 100
    for path in files:
        text = path.read_bytes().decode("utf8", errors="replace")
        for pattern in (registry, place):
            found = pattern.search(text)
            assert found is None, f"{path.relative_to(ROOT)} names {found and found.group()}"
    assert place.search("/".join(("", "root", "file"))), "the patterns work"
    assert registry.search(".".join(("files", "pythonhosted", "org")))


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf8").splitlines()
    pins = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines if line and not line.startswith("#")]
    assert all(pins), "only exact pins: no hosts, options or paths"
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}


def test_the_lock_satisfies_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    pins, extras = locked(), project["optional-dependencies"]
    wanted = [Requirement(text) for text in project["dependencies"] + extras["demo"] + extras["dev"]]
    own = next(requirement for requirement in wanted if requirement.name == "mswift")
    wanted += [Requirement(text) for extra in own.extras for text in extras[extra]]
    for requirement in wanted:
        if requirement.name != "mswift":
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
    assert len(wanted) > 15
    everything = [Requirement(text).name for text in project["dependencies"] + [text for texts in extras.values() for text in texts]]
    assert "apex" not in everything, "the apex on the package index is another project"
    assert "apex" not in pins
    assert project["scripts"]["mswift"] == project["scripts"]["swift"]


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by that name alone, and takes the first for both."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) > 50
    assert sorted({name for name in names if names.count(name) > 1}) == []
