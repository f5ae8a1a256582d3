"""Recipes: settings files that come with the package, named by `--config NAME`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hrm_ray.errors import SettingsError
from hrm_ray.settings.load import load_settings
from hrm_ray.settings.resolve import fit_warmup
from hrm_ray.settings.yaml_file import RECIPES, recipes

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_is_found_by_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings({}, Path(name)) == load_settings({}, RECIPES / f"{name}.yaml")
    assert load_settings({"--steps": "700"}, Path(name)).run.steps == 700


def test_the_warm_up_of_a_recipe_gives_way_to_other_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a file of one's own, or one typed beside it, does not."""
    monkeypatch.chdir(tmp_path)
    settings, notes = fit_warmup(load_settings({"--steps": "20"}, Path("sudoku4")), 20)
    assert settings.optimizer.warmup_steps == 2 and len(notes) == 1
    with pytest.raises(SettingsError):
        load_settings({"--steps": "20", "--warmup-steps": "100"}, Path("sudoku4"))
    with pytest.raises(SettingsError):
        load_settings({"--steps": "20"}, RECIPES / "sudoku4.yaml")


def test_a_file_of_that_name_goes_before_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sudoku4").write_text("run.steps: 3\n", encoding="utf-8")
    assert load_settings({}, Path("sudoku4")).run.steps == 3


@pytest.mark.parametrize("name", ["sudoku5", "sudoku4.yml", "jobs/sudoku4", "../sudoku4"])
def test_an_unknown_name_lists_the_recipes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError) as caught:
        load_settings({}, Path(name))
    assert f"--config {name}: there is no such file, and no recipe of that name" in str(caught.value)
    assert ", ".join(recipes()) in str(caught.value)
    assert len(str(caught.value)) < 300


def test_the_wheel_contains_the_recipes(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="builds the wheel as pip does, without the network")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "hrm_ray", tmp_path / "hrm_ray", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    built = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=True)
    wheel = tmp_path / built.stdout.split()[-1]
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"hrm_ray/recipes/{name}.yaml" for name in recipes()} <= names
    assert not [name for name in names if name.startswith(("tests/", "jobs/"))]
