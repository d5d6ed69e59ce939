"""Resolve pyproject.toml into requirements.lock and requirements-dev.lock, with hashes. Run by `make lock`.

What is locked stays as it is where pyproject.toml still allows it; with --upgrade (`make lock UPGRADE=1`) everything is resolved anew.
"""

import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIP_TOOLS = "pip-tools==7.6.0"
# Installed before the locks by plain pip: its wheels differ by platform and bring their own CUDA libraries.
NOT_LOCKED = ("torch==", "nvidia-", "triton==", "cuda-")
# Plain Python that reads a GPU's meters; torch does not bring it.
LOCKED = ("nvidia-ml-py==",)


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        venv.create(work / "venv", with_pip=True)
        subprocess.run([work / "venv/bin/pip", "install", "--quiet", PIP_TOOLS], check=True)
        run = compile_lock(work, "run", project["project"]["dependencies"] + groups["build"], None)
        dev = compile_lock(work, "dev", groups["dev"], run)
        write(ROOT / "requirements.lock", run)
        write(ROOT / "requirements-dev.lock", dev)


def compile_lock(work: Path, name: str, requirements: list[str], constraints: Path | None) -> Path:
    source, output = work / f"{name}.in", work / f"{name}.lock"
    source.write_text("\n".join(requirements) + "\n")
    if "--upgrade" not in sys.argv:
        # pip-compile keeps the versions that it finds in its output.
        shutil.copyfile(ROOT / ("requirements.lock" if name == "run" else "requirements-dev.lock"), output)
    options = ["--quiet", "--generate-hashes", "--allow-unsafe", "--strip-extras", "--no-annotate", "--no-header"]
    options += ["--no-emit-index-url", "--no-emit-find-links", "--no-emit-trusted-host"]
    if constraints is not None:
        options += ["--constraint", str(constraints)]
    subprocess.run([work / "venv/bin/pip-compile", *options, "--output-file", output, source], check=True, stdout=sys.stderr)
    return output


def write(target: Path, compiled: Path) -> None:
    lines = [
        "# Written by `make lock` from pyproject.toml.",
        f"# Install with: pip install --no-deps --require-hashes -r {target.name} (torch first, see the Makefile)",
    ]
    skipping = False
    for line in compiled.read_text().splitlines():
        if not line.startswith(" "):
            skipping = line.startswith(NOT_LOCKED) and not line.startswith(LOCKED)
        if line.strip() and not line.startswith("#") and not skipping:
            lines.append(line)
    target.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
