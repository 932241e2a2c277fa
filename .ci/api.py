"""Writes API.md: every public name of jaxmed with its parameters or value and what it says first.

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
sources. `=` is followed by what a parameter or field is where it is left out, or by the value of a
constant or type; long ones are `...`. What is listed here follows the rules of
[Versions](README.md#versions-licence-citation).
"""
LONG = 72
"""Characters beyond which a value is not shown."""

Definition = ast.FunctionDef | ast.ClassDef


def first_line(node: ast.Module | Definition) -> str:
    """The summary of a docstring, of one line or more."""
    return " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())


def shown(value: ast.expr) -> str:
    """A value as the code has it, where it is short."""
    text = ast.unparse(value)
    return text if len(text) <= LONG else "..."


def parameters(node: ast.FunctionDef, *, method: bool = False) -> str:
    """Names of the parameters as they are written, with their defaults."""
    of = node.args
    before = [*of.posonlyargs, *of.args]
    defaults = [*[None] * (len(before) - len(of.defaults)), *of.defaults, *of.kw_defaults]
    named = [
        one.arg if default is None else f"{one.arg}={shown(default)}"
        for one, default in zip([*before, *of.kwonlyargs], defaults, strict=True)
    ]
    static = any(ast.unparse(one) == "staticmethod" for one in node.decorator_list)
    star = [f"*{of.vararg.arg}"] if of.vararg else ["*"] * bool(of.kwonlyargs)
    named[len(before) : len(before)] = star
    if of.kwarg:
        named.append(f"**{of.kwarg.arg}")
    return ", ".join(named[method and not static :])


def is_public(node: ast.stmt) -> bool:
    """Whether a statement defines a function or class that people may rely on."""
    return isinstance(node, Definition) and not node.name.startswith("_")


def lines_of_class(node: ast.ClassDef) -> Iterator[str]:
    """The class, its fields in their order, and its public methods."""
    fields = [
        s.target.id if s.value is None else f"{s.target.id}={shown(s.value)}"
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


def lines_of_values(tree: ast.Module) -> Iterator[str]:
    """Constants and types that have a name, and what is taken over from other modules."""
    own = {node.name for node in tree.body if isinstance(node, Definition)}
    for node, below in zip(tree.body, [*tree.body[1:], None], strict=True):
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        own.update(names)
        if names == ["__all__"]:
            others = [name for name in ast.literal_eval(node.value) if name not in own]
            if others:
                yield f"- of other modules: {', '.join(f'`{name}`' for name in others)}"
        elif not names[0].startswith("_"):
            is_told = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            told = f": {first_line(ast.Module([below], []))}" if is_told else ""
            yield f"- `{', '.join(names)} = {shown(node.value)}`{told}"


def public_modules() -> Iterator[tuple[str, ast.Module, list[Definition]]]:
    """Name, tree and public definitions of each module that has public names."""
    for path in sorted((ROOT / "jaxmed").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        if any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        tree = ast.parse(path.read_text())
        found = [node for node in tree.body if is_public(node)]
        if name.startswith(PRIVATE):
            found = [node for node in found if node.name in EXCEPTIONS.get(name, ())]
        if found or (not name.startswith(PRIVATE) and any(lines_of_values(tree))):
            yield name, tree, found


def listing() -> str:
    """The text of API.md."""
    lines = [HEAD]
    for name, tree, found in public_modules():
        lines += [f"## `{name}`", "", first_line(tree), ""]
        if not name.startswith(PRIVATE):
            lines += lines_of_values(tree)
        for node in found:
            if isinstance(node, ast.ClassDef):
                lines += lines_of_class(node)
            else:
                lines.append(f"- `{node.name}({parameters(node)})`: {first_line(node)}")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    (ROOT / "API.md").write_text(listing())
