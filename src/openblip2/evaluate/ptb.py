"""Captions cut into the tokens that the published scores count: Penn Treebank style, lower case, no punctuation.

Source: `PTBTokenizer` of pycocoevalcap 1.2, which runs Stanford's PTBTokenizer 3.4.1 with -preserveLines -lowerCase
and drops the punctuation. That jar is used where it can be; `ptb_port` stands in for it where there is no Java.
"""

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from openblip2.errors import UserError, one_line
from openblip2.evaluate.ptb_port import port

JAR = "Stanford PTBTokenizer 3.4.1"
PORT = "openblip2's port of Stanford PTBTokenizer 3.4.1"
PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)
_END = "endoflastcaption"  # the jar says nothing of empty lines at the end


@dataclass(frozen=True)
class Tokens:
    """Cut captions, in order, with one space between tokens. `by`: `JAR` or `PORT`, for whoever reads the scores."""

    captions: tuple[str, ...]
    by: str


def tokenise(captions: Sequence[str], by: Literal["jar", "port"] | None = None) -> Tokens:
    """Cut captions as the published scores do; "" stays where nothing but punctuation is said.

    Differs from pycocoevalcap in captions with line breaks other than "\\n", which it gives to the wrong picture: all
    of them are spaces here.

    Args:
        by: None = the jar where Java and pycocoevalcap are there, else the port.

    Raises:
        UserError: the jar is asked for and cannot be used, or Java fails.
    """
    lines = [" ".join(caption.splitlines()) for caption in captions]
    if by == "port" or (by is None and why_no_jar() is not None):
        return Tokens(tuple(port(lines)), PORT)
    missing = why_no_jar()
    if missing is not None:
        raise UserError(f"the reference tokeniser cannot be used: {missing}; or leave the choice of tokeniser open")
    return Tokens(tuple(_run_jar(lines)), JAR)


def why_no_jar() -> str | None:
    """What keeps the reference's jar from being used, and how to mend it; None = nothing does."""
    if shutil.which("java") is None:
        return "`java` is not on the PATH (any Java from 8 on)"
    if reference_folder() is None:
        return "pycocoevalcap is missing (pip install 'openblip2[eval]')"
    return None


def reference_folder() -> Path | None:
    """Where pycocoevalcap is installed, without importing it."""
    spec = importlib.util.find_spec("pycocoevalcap")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    return Path(places[0]) if places else None


def _run_jar(lines: Sequence[str]) -> list[str]:
    """The jar's tokens of captions without line breaks, as pycocoevalcap calls it, punctuation dropped."""
    folder = reference_folder()
    assert folder is not None
    jar = folder / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "\n".join([*lines, _END]) + "\n"
    run = subprocess.run(command, input=text.encode(), capture_output=True)
    if run.returncode:
        said = one_line(RuntimeError(run.stderr.decode(errors="replace")))
        raise UserError(f"the reference tokeniser failed in Java: {said}; mend Java, or ask for the port")
    cut = run.stdout.decode().split("\n")
    assert cut[len(lines)] == _END, "the jar lost or added a line"
    return [
        " ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATION) for line in cut[: len(lines)]
    ]
