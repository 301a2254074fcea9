"""Packaging: two folders at the root of the checkout are installed inside the import package.

`kernels/` becomes `bokehflux.kernels` and `weights/` becomes `bokehflux.weights`, so that neither generic
name is ever claimed at the top level of somebody's environment. Everything else is in pyproject.toml.
"""

from __future__ import annotations

from setuptools import find_packages, setup

MAPPED = {"bokehflux.kernels": "kernels", "bokehflux.weights": "weights"}


def packages() -> list[str]:
    """Every import package, found afresh at each build: a new kernel folder needs no edit here."""
    names = find_packages(include=["bokehflux", "bokehflux.*"])
    for target, folder in MAPPED.items():
        names.append(target)
        names += [f"{target}.{name}" for name in find_packages(folder)]
    return names


setup(
    packages=packages(),
    package_dir=MAPPED,
    package_data={
        "bokehflux": ["py.typed"],
        "bokehflux.pictures": ["page.css", "page.html", "page.js", "page_lens.js", "fonts/*"],
        "bokehflux.weights": ["manifests/*.json", "nano/**/*", "vocabularies/**/*"],
    },
)
