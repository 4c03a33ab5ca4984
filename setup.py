"""What pyproject.toml cannot say: `configs/` stays at the top of the checkout and ships inside the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["amclr_scale*"]), "amclr_scale.configs"],
    package_dir={"amclr_scale.configs": "configs"},
)
