"""The house: a package imports only from the rows above its own, and heavy libraries only where they belong."""

import ast
from pathlib import Path

import sophia_integrations

PACKAGE = Path(sophia_integrations.__file__).parent
ROWS = {
    "cache": 0,
    "errors": 0,
    "ranges": 0,
    "tasks": 0,
    "optim": 1,
    "curvature": 2,
    "models": 2,
    "text": 2,
    "hf": 3,
    "lightning": 3,
    "recipes": 4,
    "reports": 5,
    "cli": 6,
}
FORBIDDEN = {
    "optim": {"transformers", "lightning", "datasets", "pydantic", "yaml"},
    "curvature": {"transformers", "lightning", "datasets", "pydantic", "yaml"},
    "text": {"lightning", "pydantic", "yaml", "trl", "peft"},
    "hf": {"lightning", "datasets", "pydantic", "yaml"},
}


def imports(path):
    """Absolute dotted names that a file imports, relative ones resolved."""
    package = ["sophia_integrations", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ([f"{module}.{alias.name}" for alias in node.names] if node.module is None else [module])


def files():
    for path in sorted(PACKAGE.rglob("*.py")):
        home = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if home in ROWS:
            yield home, path


def test_every_package_has_a_row():
    found = {p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert found <= ROWS.keys()
    assert {"optim", "curvature", "hf", "recipes", "reports"} <= found


def test_imports_point_upwards_only():
    wrong = []
    for home, path in files():
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "sophia_integrations" or len(parts) < 2 or parts[1] not in ROWS or parts[1] == home:
                continue
            if ROWS[parts[1]] >= ROWS[home]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_upper_rows_know_no_trainer():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for home, path in files()
        for name in imports(path)
        if name.split(".")[0] in FORBIDDEN.get(home, ())
    ]
    assert not wrong


def test_files_stay_short():
    long = {str(p.relative_to(PACKAGE)): n for _, p in files() if (n := len(p.read_text().splitlines())) > 350}
    assert not long
