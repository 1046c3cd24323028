"""The compiled part of the package; everything else is in pyproject.toml, where setuptools calls extensions experimental."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(  # plain C for ctypes, no module of Python's
            "twinmerge.maths._fused",
            ["src/twinmerge/maths/fused.c"],
            libraries=["m"],
            extra_compile_args=["-std=c11", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
            optional=True,  # without a C compiler the package installs all the same, and torch does its work
        )
    ]
)
