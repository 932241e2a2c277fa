"""Writes API.md: every public name of jaxmed with its parameters and the first line it says.

    python .ci/api.py

A change of the public interface is a change of this file, so that a review sees it; the tests
compare the two.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What may change without notice, by the beginning of the module's name.
PRIVATE = (
    "jaxmed.build.",
    "jaxmed.benchmark.",
    "jaxmed.evaluation.report_parts.",
    "jaxmed.models.convolution_primitive",
    "jaxmed.models.onednn",
)
EXCEPTIONS = {  # public all the same
    "jaxmed.build.trained": ("load_run",),
    "jaxmed.build.runs": ("train_run",),
    "jaxmed.build.evaluations": ("evaluate_run",),
    "jaxmed.build.predictions": ("predict_run",),
}
HEAD = """# Public interface

Written by `python .ci/api.py` from the code; `help(NAME)` in Python has shapes, units, errors and
sources. A name with `=` may be left out. What is listed here follows the rules of
[Versions](README.md#versions-licence-citation).
"""

Definition = ast.FunctionDef | ast.ClassDef


def first_line(node: ast.Module | Definition) -> str:
    """The summary of a docstring, of one line or more."""
    return " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())


def parameters(node: ast.FunctionDef, *, method: bool = False) -> str:
    """Names of the parameters as they are written, those with a default marked by `=`."""
    of = node.args
    before = [*of.posonlyargs, *of.args]
    with_default = {id(one) for one in before[len(before) - len(of.defaults) :] if of.defaults}
    with_default |= {
        id(one)
        for one, default in zip(of.kwonlyargs, of.kw_defaults, strict=True)
        if default is not None
    }
    static = any(ast.unparse(one) == "staticmethod" for one in node.decorator_list)
    shown = [f"{a.arg}{'=' * (id(a) in with_default)}" for a in before[method and not static :]]
    if of.vararg:
        shown.append(f"*{of.vararg.arg}")
    elif of.kwonlyargs:
        shown.append("*")
    shown += [f"{a.arg}{'=' * (id(a) in with_default)}" for a in of.kwonlyargs]
    if of.kwarg:
        shown.append(f"**{of.kwarg.arg}")
    return ", ".join(shown)


def is_public(node: ast.stmt) -> bool:
    """Whether a statement defines a function or class that people may rely on."""
    return isinstance(node, Definition) and not node.name.startswith("_")


def lines_of_class(node: ast.ClassDef) -> Iterator[str]:
    """The class, its fields in their order, and its public methods."""
    fields = [
        f"{s.target.id}{'=' * (s.value is not None)}"
        for s in node.body
        if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)
        if not s.target.id.startswith("_")
    ]
    constructor = [s for s in node.body if isinstance(s, ast.FunctionDef) and s.name == "__init__"]
    taken = parameters(constructor[0], method=True) if constructor else ", ".join(fields)
    yield f"- class `{node.name}({taken})`: {first_line(node)}"
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and is_public(member):
            is_property = any("property" in ast.unparse(d) for d in member.decorator_list)
            inside = "" if is_property else f"({parameters(member, method=True)})"
            yield f"  - `{member.name}{inside}`: {first_line(member)}"


def public_modules() -> Iterator[tuple[str, ast.Module, list[Definition]]]:
    """Name, tree and public definitions of each module that has some."""
    for path in sorted((ROOT / "jaxmed").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        if any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        tree = ast.parse(path.read_text())
        found = [node for node in tree.body if is_public(node)]
        if name.startswith(PRIVATE):
            found = [node for node in found if node.name in EXCEPTIONS.get(name, ())]
        if found:
            yield name, tree, found


def listing() -> str:
    """The text of API.md."""
    lines = [HEAD]
    for name, tree, found in public_modules():
        lines += [f"## `{name}`", "", first_line(tree), ""]
        for node in found:
            if isinstance(node, ast.ClassDef):
                lines += lines_of_class(node)
            else:
                lines.append(f"- `{node.name}({parameters(node)})`: {first_line(node)}")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    (ROOT / "API.md").write_text(listing())
