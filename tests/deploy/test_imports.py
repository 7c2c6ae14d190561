"""What a process imports only because it holds another one's handle is time that every start pays."""

import subprocess
import sys

import pytest


def heavy_modules(module: str) -> str:
    heavy = "{'torch', 'transformers', 'ray', 'ray.train', 'sympy', 'pandas', 'peft', 'numpy', 'pydantic'}"
    code = f"import sys, {module}; print(*sorted({heavy} & set(sys.modules)))"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    "actor", ["coordinator", "environment", "generation", "grading", "journal", "policy_store", "reference"]
)
def test_holders_of_an_actors_handle_import_neither_torch_nor_transformers(actor: str) -> None:
    assert set(heavy_modules(f"deploy.remote.{actor}").split()) <= {"numpy", "pydantic", "ray"}


def test_the_driver_imports_torch_for_the_check_of_the_objective_and_no_model_code() -> None:
    assert heavy_modules("deploy.run") == "numpy pydantic ray torch"


def test_help_imports_neither_the_config_nor_numpy() -> None:
    assert heavy_modules("deploy.cli") == ""
