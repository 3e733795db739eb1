"""Builds the compiled kernels of csrc/ into the package; everything else about it is in pyproject.toml.

Never a reason not to install: without a compiler, on another processor than x86-64, or where torch is not there to build against, the
package goes in without them, `mswift/kernels/lib/build.txt` says why, and the plain-torch reference is used. The kernels belong to the torch
they were built against. Under build isolation torch is not among the build requirements (pip would fetch another one): that of the
environment to install into is used, and it must be there first.

    MSWIFT_BUILD=0          do not build           MSWIFT_BUILD=1   fail if the build fails
    MSWIFT_CUDA=0|1         without | with the CUDA kernels, whatever is found; at run time too

What an earlier build left in place of what is not built now is removed.
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WANTED = os.environ.get("MSWIFT_BUILD", "auto")
CUDA = os.environ.get("MSWIFT_CUDA", "auto")
cuda = runpy.run_path(str(ROOT / "mswift" / "kernels" / "cuda_build.py"))
CPU_LIBRARY, CUDA_FILES = "libmswift_cpu.so", (cuda["LIBRARY"], cuda["REPORT"], cuda["DIGEST"])
FLAGS = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-unknown-pragmas"]
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # of which the intrinsics in GCC 12's own headers are full


def add_tools_to_path() -> None:
    """ninja lies beside the interpreter, which need not be on PATH."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def find_torch() -> bool:
    """Import torch: from the build environment, or under build isolation from the environment that the package goes into."""
    for place in ("", sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        if place and place not in sys.path:
            sys.path.append(place)
        try:
            import torch  # noqa: F401
        except ImportError:
            continue
        return True
    return False


def hindrance() -> str | None:
    """Why the kernels cannot be built here; None: they can."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if WANTED == "0":
        return "MSWIFT_BUILD=0"
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        return f"{sys.platform} on {platform.machine()}; the kernels are for Linux on x86-64"
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler})"
    if not find_torch():
        return "torch was not installed in this environment when the package was"
    return None


def build_cuda(into: Path) -> str:
    """Compile `libmswift_cuda.so` into `kernels/lib` of the package, next to whatever torch is there; one line of what came of it."""
    forget(into, *CUDA_FILES)
    if CUDA == "0":
        return "no CUDA kernels (MSWIFT_CUDA=0)"
    nvcc = cuda["find_nvcc"]()
    if nvcc is None:
        return "no CUDA kernels (no nvcc on PATH or in CUDA_HOME)"
    try:
        cuda["build"](nvcc, into / "kernels" / "lib")
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        if CUDA == "1":
            raise SystemExit(f"error: MSWIFT_CUDA=1, but {error}") from error
        return f"no CUDA kernels ({error})"
    return f"CUDA kernels for sm_{', sm_'.join(cuda['architectures'](nvcc))}"


def make_builder() -> type[build_ext]:
    """torch's build_ext, which knows torch's headers and flags, made forgiving."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):  # type: ignore[misc]
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "no_python_abi_suffix": True})

        def get_ext_filename(self, ext_name: str) -> str:
            """A library and no module: there is nothing to import in it."""
            return os.path.join(*ext_name.split(".")[:-1], CPU_LIBRARY)

        def run(self) -> None:
            try:
                (self.package_folder() / "kernels" / "lib").mkdir(parents=True, exist_ok=True)  # setuptools does not, in place
                super().run()
            except (OSError, RuntimeError, subprocess.CalledProcessError, SystemExit) as error:
                self.give_up(error)
            except Exception as error:  # setuptools and torch have errors of their own for a compiler that fails
                if "Compile" not in type(error).__name__ and "Link" not in type(error).__name__:
                    raise
                self.give_up(error)
            else:
                note(self.package_folder(), f"built: CPU kernels; {build_cuda(self.package_folder())}")

        def package_folder(self) -> Path:
            return (ROOT if self.inplace or self.editable_mode else Path(self.build_lib)) / "mswift"

        def give_up(self, error: BaseException) -> None:
            if WANTED == "1":
                raise error
            self.extensions = []
            forget(self.package_folder(), *CUDA_FILES, CPU_LIBRARY)
            note(self.package_folder(), f"the compiler failed: {' '.join(str(error).split())[-300:]}")

    return Build


class Without(build_ext):
    """Builds nothing and leaves a note."""

    def run(self) -> None:
        self.extensions = []
        folder = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib)) / "mswift"
        forget(folder, *CUDA_FILES, CPU_LIBRARY)
        note(folder, str(reason))


def forget(package: Path, *names: str) -> None:
    """What an earlier build left there is not what `build.txt` speaks of, and would be loaded, or go into a wheel."""
    for name in names:
        (package / "kernels" / "lib" / name).unlink(missing_ok=True)


def note(package: Path, text: str) -> None:
    print(f"mswift: kernels: {text}")
    (package / "kernels" / "lib").mkdir(parents=True, exist_ok=True)
    (package / "kernels" / "lib" / "build.txt").write_text(text + "\n", encoding="utf8")


reason = hindrance()
if reason and WANTED == "1":
    raise SystemExit(f"error: MSWIFT_BUILD=1, but {reason}")
if CUDA == "1" and (reason or cuda["find_nvcc"]() is None):
    raise SystemExit(f"error: MSWIFT_CUDA=1, but {reason or 'there is no nvcc: put it on PATH or set CUDA_HOME'}")
sources = ["csrc/ops.cpp", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))]
headers = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".inc"))
if reason:
    # An extension that is never compiled: with it the wheel is one of this platform, and build_ext runs.
    setup(ext_modules=[Extension("mswift.kernels.lib.cpu", sources)], cmdclass={"build_ext": Without})
else:
    from torch.utils.cpp_extension import CppExtension

    add_tools_to_path()
    extension = CppExtension(
        "mswift.kernels.lib.cpu",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        depends=headers,
        extra_compile_args=FLAGS,
        extra_link_args=["-fopenmp", "-Wl,--no-undefined", "-Wl,-s"],
    )
    setup(ext_modules=[extension], cmdclass={"build_ext": make_builder()})
