"""Install the folder `models` as `dynlora_programs.models`. Everything else is in pyproject.toml."""

from setuptools import find_packages, setup

programs = [f"dynlora_programs.{package}" for package in find_packages(include=["models", "models.*"])]
setup(
    packages=find_packages(include=["dynlora_fn", "dynlora_fn.*", "dynlora_programs"]) + programs,
    package_dir={"dynlora_programs.models": "models"},
)
