"""The compiled part of the package; everything else is in pyproject.toml, where setuptools calls extensions experimental.

It is plain C for ctypes and no module of Python's, so its file is `_fused.so` (`_fused.dll` on Windows) whatever the Python,
and one wheel, py3-none-<platform>, serves all of them. Without a C compiler there is no such file, and the wheel is py3-none-any.
"""

import os

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NAME = "twinmerge.maths._fused"


class BuildLibrary(build_ext):
    """Builds a shared library in the place of a module of Python's."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + (".dll" if os.name == "nt" else ".so")

    def get_export_symbols(self, ext):
        return ext.export_symbols


class Wheel(bdist_wheel):
    """Says what it needs: a platform if the library was built, else nothing."""

    def run(self):
        self.run_command("build")
        if not os.path.exists(self.get_finalized_command("build_ext").get_ext_fullpath(NAME)):
            self.distribution.ext_modules = None
            self.root_is_pure = True
        super().run()

    def get_tag(self):
        return "py3", "none", "any" if self.root_is_pure else super().get_tag()[2]


setup(
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
    ext_modules=[
        Extension(
            NAME,
            ["src/twinmerge/maths/fused.c"],
            libraries=["m"],
            extra_compile_args=["-std=c11", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
            optional=True,  # without a C compiler the package installs all the same, and torch does its work
        )
    ],
)
