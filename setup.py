"""Maps the two source folders to one import package: engine/ is `burnish`, kernels/ is `burnish.kernels`.

Sub-packages are found, not listed: a new folder under engine/ ships in the wheel without touching this file.
"""

from setuptools import find_packages, setup

setup(
    package_dir={"burnish": "engine", "burnish.kernels": "kernels"},
    packages=[
        "burnish",
        *(f"burnish.{name}" for name in find_packages("engine")),
        "burnish.kernels",
        *(f"burnish.kernels.{name}" for name in find_packages("kernels")),
    ],
)
