"""Everything about the package is said once, in settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
with (root / "settings.ini").open(encoding="utf-8") as f: ini.read_file(f)
cfg = ini["DEFAULT"]
lib, readme = cfg["lib_path"], root / "README.md"

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"],
    author=cfg["author"], author_email=cfg["author_email"], keywords=cfg["keywords"].split(),
    license={"apache2": "Apache-2.0"}[cfg["license"]],
    # README.md is made by the package's own tools, so a first install comes before it
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[lib, f"{lib}.*"]), include_package_data=True,
    install_requires=cfg["requirements"].split(), extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{lib}={lib}._modidx:d"]},
)
