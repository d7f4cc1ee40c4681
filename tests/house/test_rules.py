"""The rules of the house, held against the repository itself."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from streams import VERSION

ROOT = Path(__file__).parents[2]
# An address in a lock ties every installation to one network.
REGISTRY = re.compile(
    r"https?://[^\s\"'<>]*(pypi|pythonhosted|npmjs|rubygems|artifactory|nexus|/simple\b"
    r"|repo1?\.maven|repo1?\.apache|central\.sonatype|proxy\.golang)",
    re.IGNORECASE,
)
HOME_FOLDER = re.compile(r"(?<![\w.])/(root|home/\w+|Users/\w+)/\w")
EMPTY_NAMES = {"utils", "util", "helper", "helpers", "common", "misc", "manager", "base"}
FRAMEWORKS = {"faust", "aiokafka", "asyncio", "logging", "random", "structlog", "aiohttp", "typer"}


def committed() -> list[Path]:
    """Every file that is in git or would go in with `git add`."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    found = [path for path in paths if path.is_file()]  # a file removed but not yet staged is gone
    assert len(found) > 10
    return found


def lines_matching(pattern: re.Pattern[str]) -> Iterator[str]:
    for path in committed():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                yield f"{path.relative_to(ROOT)}:{number}"


def modules(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def pyproject() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def locked(name: str) -> dict[str, str]:
    """The versions a lock pins, by canonical name."""
    text = (ROOT / "requirements" / name).read_text()
    found = re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;\\]+)", text, re.MULTILINE)
    return {canonicalize_name(package): version for package, version in found}


def in_a_new_interpreter(code: str, folder: Path) -> str:
    """What `code` prints in an interpreter that imported nothing yet; stderr must stay empty."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": os.defpath, "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


@pytest.mark.parametrize(
    "line",
    [
        "--index-url https://pypi.example/simple",
        "url = 'https://files.pythonhosted.org/x.whl'",
        "<url>https://repo1.maven.org/maven2</url>",
    ],
)
def test_the_pattern_for_registries_finds_one(line: str) -> None:
    assert REGISTRY.search(line)


def test_no_file_names_the_address_of_a_registry() -> None:
    here = Path(__file__).relative_to(ROOT).as_posix()
    assert [line for line in lines_matching(REGISTRY) if not line.startswith(here)] == []


def test_no_file_names_somebodys_home_folder() -> None:
    assert list(lines_matching(HOME_FOLDER)) == []


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in modules("schemas", "streams", "tests")
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_no_module_has_a_name_that_means_nothing() -> None:
    paths = modules("schemas", "streams", "tests")
    assert {part for path in paths for part in path.with_suffix("").parts} & EMPTY_NAMES == set()


def test_wire_and_core_load_no_framework_when_they_are_imported(tmp_path: Path) -> None:
    loaded = in_a_new_interpreter(
        "import importlib, pkgutil, sys\n"
        "import schemas, streams.billing\n"
        "for package in (schemas, streams.billing):\n"
        "    for found in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(found.name)\n"
        "print(*sys.modules)",
        tmp_path,
    ).split()
    assert "streams.billing.ledger" in loaded
    assert FRAMEWORKS.isdisjoint(loaded)


def test_nothing_happens_on_import(tmp_path: Path) -> None:
    said = in_a_new_interpreter(
        "import importlib, pkgutil, signal, threading\n"
        "import streams\n"
        "before = signal.getsignal(signal.SIGTERM)\n"
        "for found in pkgutil.walk_packages(streams.__path__, 'streams.'):\n"
        "    importlib.import_module(found.name)\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "assert signal.getsignal(signal.SIGTERM) is before",
        tmp_path,
    )
    assert said == ""
    assert list(tmp_path.iterdir()) == []


def test_the_version_is_the_same_everywhere() -> None:
    project = pyproject()["project"]
    assert isinstance(project, dict)
    assert project["version"] == VERSION


def test_the_main_lock_satisfies_every_dependency() -> None:
    project = pyproject()["project"]
    assert isinstance(project, dict)
    versions = locked("main.lock")
    for text in project["dependencies"]:
        wanted = Requirement(text)
        name = canonicalize_name(wanted.name)
        assert name in versions, f"{name}: the lock is older than pyproject.toml"
        assert wanted.specifier.contains(versions[name]), (
            f"{name}: the lock is older than pyproject.toml"
        )


def test_the_development_lock_has_all_it_was_made_from_and_agrees_with_the_main_lock() -> None:
    main, dev = locked("main.lock"), locked("dev.lock")
    lines = (ROOT / "requirements" / "dev.in").read_text().splitlines()
    wanted = [line for line in lines if line.strip() and not line.startswith(("#", "-"))]
    assert {canonicalize_name(Requirement(line).name) for line in wanted} <= dev.keys()
    both = main.keys() & dev.keys()
    assert [name for name in both if main[name] != dev[name]] == []


@pytest.mark.parametrize("name", ["main.lock", "dev.lock"])
def test_everything_locked_has_a_hash(name: str) -> None:
    entries = re.split(r"\n(?=\S)", (ROOT / "requirements" / name).read_text())
    pinned = [entry for entry in entries if "==" in entry]
    assert len(pinned) > 20
    assert [entry for entry in pinned if "--hash=sha256:" not in entry] == []


def test_the_build_uses_what_is_locked() -> None:
    build = pyproject()["build-system"]
    assert isinstance(build, dict)
    for text in build["requires"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(locked("dev.lock")[canonicalize_name(wanted.name)])


def test_the_makefile_is_short_and_explains_itself() -> None:
    lines = (ROOT / "Makefile").read_text().splitlines()
    targets = [line for line in lines if re.match(r"[a-zA-Z][\w-]*\s*:(?!=)", line)]
    assert 0 < len(targets) <= 12
    assert [line for line in targets if "## " not in line] == []
    helped = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for line in targets:
        assert line.partition(":")[0].strip() in helped


def test_continuous_integration_runs_what_a_developer_runs() -> None:
    script = ROOT / ".ci" / "run"
    commands = [line for line in script.read_text().splitlines() if line and line[0] != "#"]
    assert commands[0] == "set -euo pipefail"
    assert commands[-1] == "exec make test"
    assert os.access(script, os.X_OK)


def test_no_compiled_module_defines_a_struct() -> None:
    """mypyc takes a struct's options away, and its members' order, which is that of the wire."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    build = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["mypyc"]
    compiled = [ROOT / name.lstrip("/") for name in build["include"]]
    assert len(compiled) > 10
    for path in compiled:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base) for base in node.bases]
                assert not any(base.endswith("Struct") for base in bases), f"{path}: {node.name}"
