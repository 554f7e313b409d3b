"""Packaging: everything is read from settings.ini, which nbdev shares."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], license="MIT",
    author=cfg["author"], author_email=cfg["author_email"], keywords=cfg["keywords"],
    long_description=Path("README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    packages=find_packages(include=["tmlab", "tmlab.*"]), package_data={"tmlab": ["static/*", "static/**/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(), extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in ("dev", "ray", "experiments")},
    entry_points={"console_scripts": cfg["console_scripts"].split("\n")}, zip_safe=False,
)
