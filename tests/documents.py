"""What the README and the pages of docs print: their code blocks, and the fedrag commands among them."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README = DOCUMENTS["README.md"]


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def shell_lines(text: str) -> list[str]:
    """Return the lines of the shell's code blocks."""
    return [line for block in blocks(text, "sh") for line in block.splitlines() if line]


def fedrag_commands(text: str) -> list[list[str]]:
    """Return the arguments of the fedrag commands, split as a shell splits them."""
    return [shlex.split(line)[1:] for line in shell_lines(text) if line.startswith("fedrag ")]


def inline_code(text: str) -> list[str]:
    """Return what stands in backticks in the running text and in tables."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", prose)


def copy_configs(folder: Path) -> None:
    """Make a folder look like a checkout, as far as the commands need it."""
    shutil.copytree(ROOT / "configs", folder / "configs")
