"""Names of vLLM's that are relied on, looked up in its sources: no GPU and no import of it is needed.

Runs where ``KVTHRIFT_VLLM_SOURCE`` is a folder with the unpacked wheel of a served version.
"""

from __future__ import annotations

import ast
import os
from functools import cache
from pathlib import Path

import pytest

from kvthrift.errors import UnsupportedModelError
from kvthrift.integrations.vllm.contract import PRIVATE, PRIVATE_GPU, SERVED, check_version

SOURCE = os.environ.get("KVTHRIFT_VLLM_SOURCE", "")


@cache
def module(name: str) -> ast.Module:
    path = Path(SOURCE, *name.split("."))
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def find(name: str, wanted: str) -> tuple[str, ast.ClassDef | ast.FunctionDef]:
    """A class or function of a module, wherever it was imported from."""
    for node in ast.walk(module(name)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == wanted:
            return name, node
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vllm"):
            for one in node.names:
                if (one.asname or one.name) == wanted:
                    return find(node.module, one.name)
    raise AssertionError(f"{name} has no {wanted}")


def member(name: str, owner: ast.ClassDef, wanted: str) -> ast.FunctionDef:
    """A method of a class or of those it is made from."""
    for node in owner.body:
        if isinstance(node, ast.FunctionDef) and node.name == wanted:
            return node
    for base in owner.bases:
        label = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(label, ast.Name) and label.id not in ("ABC", "Generic", "Protocol"):
            try:
                return member(*find(name, label.id), wanted)  # type: ignore[arg-type]
            except AssertionError:
                continue
    raise AssertionError(f"{owner.name} has no {wanted}")


def parameters(node: ast.ClassDef | ast.FunctionDef) -> set[str]:
    """What a function takes, or the fields of a class and what its methods give it."""
    if isinstance(node, ast.FunctionDef):
        given = node.args
        names = {one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)}
        return names | ({"**"} if given.kwarg else set())
    found = {one.target.id for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)}
    found |= {one.name for one in node.body if isinstance(one, ast.FunctionDef)}
    for one in ast.walk(node):
        if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store):
            found.add(one.attr)
    return found


def is_there(path: str, wanted: tuple[str, ...]) -> bool:
    name, _, rest = path.partition(":")
    first, _, second = rest.partition(".")
    where, node = find(name, first)
    if second:
        assert isinstance(node, ast.ClassDef)
        node = member(where, node, second)
    names = parameters(node)
    return "**" in names or set(wanted) <= names


@pytest.mark.skipif(not SOURCE, reason="no sources of vLLM")
@pytest.mark.parametrize("path", PRIVATE_GPU)
def test_a_name_that_is_relied_on_is_there(path: str) -> None:
    assert is_there(path, PRIVATE_GPU[path])


@pytest.mark.skipif(not SOURCE, reason="no sources of vLLM")
def test_a_name_that_is_not_there_is_missed() -> None:
    with pytest.raises(AssertionError, match="has no"):
        is_there("vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_nothing", ())
    assert not is_there("vllm.v1.worker.gpu.states:RequestState", ("prompt_len", "nonsense"))


def test_versions_are_those_of_a_device() -> None:
    check_version("0.26.0", "cuda")
    check_version("0.32.0+cpu", "cpu")
    for device, version in (("cuda", "0.32.0"), ("cuda", "0.27.0"), ("cpu", "0.26.0+cpu")):
        with pytest.raises(UnsupportedModelError, match=f"where it runs on {device}"):
            check_version(version, device)
    assert set(SERVED) == {"cpu", "cuda"}
    assert set(PRIVATE) & set(PRIVATE_GPU)
