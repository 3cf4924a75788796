"""Splits captions into the tokens that published scores use: Penn Treebank style, lower case, without punctuation.

Source: `PTBTokenizer` of pycocoevalcap 1.2, which runs Stanford's PTBTokenizer 3.4.1 with -preserveLines -lowerCase
and drops the punctuation. That jar is used if Java is installed, otherwise our port.

The port was written from the jar's output, not from its source. It has the jar's peculiarities: brackets stay as
"-lrb-", "!!" stays although "!" is dropped, "£" becomes "#", and "1 1/2" is one token with a no-break space.
`tests/test_caption_metrics.py` compares it with the jar's output for 720 captions. It differed in 1 of 26,816 lines of
English prose, and in 30 of 20,000 captions made of unusual pieces. Known differences: several kinds of quotes in a row,
an abbreviation with an "s", "&QUOT;", scripts with combining marks of their own (Thai, Hindi), and characters that are
newer than Unicode 6.
"""

import importlib.util
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from openblip2.errors import UserError, one_line

JAR = "Stanford PTBTokenizer 3.4.1"
PORT = "openblip2's port of Stanford PTBTokenizer 3.4.1"
_END = "endoflastcaption"  # without it the jar prints nothing for empty lines at the end


def tokenise(captions: Sequence[str], jar: bool = True) -> tuple[list[str], str]:
    """Returns the tokens of captions as published scores use them, and the tokeniser, `JAR` or `PORT`.

    The tokens of a caption are separated by one space; a caption that is only punctuation becomes "".

    Differs from pycocoevalcap for captions with line breaks other than "\\n": pycocoevalcap assigns their tokens to the
    wrong image; here, all line breaks become spaces.

    Args:
        captions: any text.
        jar: use the jar if Java and pycocoevalcap are installed; False = the port.

    Raises:
        UserError: Java fails.
    """
    lines = [" ".join(caption.splitlines()) for caption in captions]
    if jar and why_no_jar() is None:
        return _run_jar(lines), JAR
    return port(lines), PORT


def why_no_jar() -> str | None:
    """Why the reference's jar cannot be used and how to fix that; None = it can be used."""
    if shutil.which("java") is None:
        return "`java` is not on the PATH (any Java from 8 on)"
    if importlib.util.find_spec("pycocoevalcap") is None:
        return "pycocoevalcap is missing (pip install 'openblip2[eval]')"
    return None


def _run_jar(lines: Sequence[str]) -> list[str]:
    """Runs the jar as pycocoevalcap does, on captions without line breaks, and drops the punctuation."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = str(Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR))
    command = ["java", "-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "\n".join([*lines, _END]) + "\n"
    run = subprocess.run(command, input=text.encode(), capture_output=True)
    if run.returncode:
        said = one_line(RuntimeError(run.stderr.decode(errors="replace")))
        raise UserError(
            f"the reference tokeniser failed in Java: {said}; repair Java, or remove it from the PATH to use ours"
        )
    found = run.stdout.decode().split("\n")
    assert found[len(lines)] == _END, "the jar lost or added a line"
    split = [line.rstrip().split(" ") for line in found[: len(lines)]]
    return [" ".join(token for token in tokens if token not in ptbtokenizer.PUNCTUATIONS) for tokens in split]


# Abbreviations that always keep their period.
_ABBREVIATIONS = """adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bhd bldg blvd brig bros calif
capt cf cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri
ft ga gen gov govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mich
minn mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph ph.d plc ppte pptes ppty pptys
pres prof profs pte ptes pty ptys pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt supts sys
tel tenn thu thurs treas tue tues univ va vs vt wed wis wisc wm wyo"""
_STATES = "La Pa Az Ark Del Ill Ore Tex Mass Miss Wash"  # only with a capital letter: "wash." ends a sentence
_BEFORE_A_NUMBER = "ca no op pp art fig figs nos prop"
# If one of these words follows a single letter and a period, the period ends the sentence.
_STARTS = """A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More
Mr. Ms. Now Once One Other Our She Since So Some Such That The Their Then There These They This We What When While
Yet You"""
_FILES = """bat bmp c cgi class cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov pdf php pl png ppt ps py
sql tar txt wav x xml zip"""

_MARKS = "\u0300-\u036f"
_L = rf"(?:[^\W\d_]|[{_MARKS}])"
_W = rf"(?:[^\W_]|[{_MARKS}])"
_A = "['\u2019]"
_ENDING = r"(?i:'(?:s|m|d|ll|re|ve)(?![a-z])|\u2019(?:s|m|d|ll|re|ve))"
_NOT_IN_A_WORD = r"(?![^\W_])"


def _any(words: str) -> str:
    return "|".join(map(re.escape, sorted(words.split(), key=len, reverse=True)))


# If a rule has a group, only the group becomes the token, but the length of the whole match decides which rule wins.
_RULES = tuple(
    re.compile(rule)
    for rule in (
        # Two words written as one.
        rf"(?i:(can)not|(?:(gon|wan)na)|(got)ta|(gim|lem)me){_NOT_IN_A_WORD}(?!{_ENDING})",
        # Words: with inner periods, "rock!star", hyphens and slashes.
        rf"{_L}{_W}*(?:[.!?]{_L}{_W}*)*(?:[-\u2010\u2011]{_W}+)*",
        rf"{_W}+(?:[-_\u2010\u2011]{_W}+)*",
        rf"{_W}(?:{_W}|[.,])*(?:-{_W}+)+",
        rf"{_W}+(?:-{_L}+)*(?:\\?/{_W}+(?:-{_L}+)*){{1,2}}",
        rf"(?:{_W}+-)*{_L}\.(?:{_L}\.)+|{_L}\.(?!\s+(?:{_any(_STARTS)}|{_any(_STARTS.upper())})(?:\s|$))",
        rf"(?:{_W}+\.)+(?i:{_any(_FILES)})(?=[\s.,!?]|$)",
        rf"({_W}+(?:-{_W}+)*\.)[,;:]",
        r"[A-Z]+(?:[&+][A-Z]+)+|[Cc](?:\+\+|#)|[A-Z]+\$",
        # Abbreviations.
        rf"(?i:{_any(_ABBREVIATIONS)})\.|(?:{_any(_STATES)}|{_any(_STATES.upper())})\.",
        rf"((?i:{_any(_BEFORE_A_NUMBER)})\.)\s*\d",
        rf"([A-Za-z]+){_ENDING}",
        # Apostrophes: "don't" is "do n't", "o'clock" and "ma'am" are whole, "y'all" is "y' all".
        rf"([A-Za-z]*[A-MO-Za-mo-z])[Nn]{_A}[Tt]",
        rf"(?i:n{_A}t)|{_ENDING}",
        rf"[A-HJ-XZdlno]{_A}{_L}{_L}+|[A-Za-z]+[aeiouyAEIOUY]{_A}[aeiouA-Z][A-Za-z]*",
        rf"(?i:ol{_A}|li{_A}l|somethin{_A}|dunkin{_A}|cap{_A}n|nor{_A}easter|e{_A}er|c{_A}est|c'mon|s'mores|nat'l|cont'd\.)",
        rf"(?i:y{_A})(?=[A-Za-z])|[djlDJL]{_A}|(?i:{_A}(?:em|cause|till?))|{_A}[Nn]{_A}|{_A}[Nn](?=\s|$)|(?i:'t(?=is|was))",
        rf"{_A}\d0[sS]|{_A}\d\d(?=\s|$)",
        # Numbers, fractions and telephone numbers.
        r"[+-]?(?:\d+(?:[.,:]\d+)*|(?:[.,:]\d+)+)",
        r"(?:\d{1,4}[- \u00a0])?\d{1,4}[/\u2044]\d{1,4}|\d{1,2}[-/]\d{1,2}[-/]\d{2,4}",
        r"(?:\+\d{1,3}[- ])?(?:\(\d{2,4}\)[- ]?|\d{2,4}[- ])\d{3,4}[- ]\d{3,5}",
        # The web.
        r"(?i:https?)://[^\s\"<>|(){}]+[^\s\"<>|(){}.,!?-]",
        r"(?:[^\W\d_A-Z]+\.)*[^\W\d_A-Z]{2,}\.(?:com|net|org|edu)/[^\s\"<>|()]+[^\s\"<>|().,!?-]",
        r"<?(?:mailto:)?[A-Za-z0-9][^\s\"<>|()]*@(?:[^\s\"<>|().]+\.)*[^\s\"<>|().]+>?",
        r"@[A-Za-z_]\w*|#[^\W\d_]+",
        r"<[A-Za-z][\w:.-]*(?: +[A-Za-z][\w:.-]*(?: *= *(?:'[^'\n]*'|\"[^\"\n]*\"))?)* */?>|</[A-Za-z][\w:.-]* *>",
        r"<[!?][A-Za-z-][^>\n]*>|(?i:&(?:amp|lt|gt|quot|apos|nbsp|[mn]dash|md);)|&#\d+;",
        # Emoticons.
        rf"[<>]?[:;=][-o*']?[()\[\]{{dDpPO|\\@]{_NOT_IN_A_WORD}|:[03]{_NOT_IN_A_WORD}|@_[xoTQvu0OX]",
        r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([-^x=~<>']-[\^x=~<>'`]\)",
        # Everything else.
        r"\.{3,}|[!?]+|-{2,4}(?!-)|-{5,}|''|``|\\\*|\*+|#+|@+|_+|<<|>>|[^\S\n]+|\n|\S",
    )
)
_PLAIN = re.compile(r"[A-Za-z]+(?=\s|$)|[^\S\n]+")  # most of a caption, which does not need the rules
_TWO_WORDS = frozenset(("cannot", "gonna", "wanna", "gotta", "gimme", "lemme"))

_TOKENS_ALONE = re.compile(
    "[\u00a1-\u00bf\u00d7\u00f7\u2016\u2017\u201a\u201e-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2070-\u208e\u20a0\u20a4"
    "\u20ac\u2100-\u214f\u2153-\u215e\u2190-\u2bff\u3001\u3002\u3012\u30fb\uff01-\uff65\uffe0\uffe1\uffe5\uffe6]"
)
_UNUSUAL = re.compile(r"[^\x00-\x7f\u00a0\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u036f\u2010\u2011\u2019\u2044]")
_DROPPED = frozenset((*".?!,:;-\"'`\u2019", "--", "---", "----", "''", "``", "&quot;", "&apos;", "&nbsp;"))
_DROPPED |= {"\u00ab", "\u00bb", "&mdash;", "&ndash;", "&md;"}
_SPELT = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **{"\u00a3": "#", "\u00a4": "$", "\u20a0": "$", "\u20ac": "$", "\u00a2": "cents"},
    **{"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"},
    **{"&amp;": "&", "&lt;": "<", "&gt;": ">", "n\u2019t": "n't"},
    **{f"\u2019{end}": f"'{end}" for end in ("s", "m", "d", "ll", "re", "ve")},
}


def port(captions: Sequence[str]) -> list[str]:
    """Tokenises captions without line breaks with the port; tokens are separated by one space.

    The jar reads the captions as the lines of one file. Therefore, in the jar and in the port, the tokens of a caption
    that ends with an abbreviation, or a letter with a period, can depend on the first word of the next caption.
    """
    text = "\n".join(captions)
    text = _UNUSUAL.sub(lambda found: _apart(found.group()), text.replace("\u00ad", "").replace("\u0092", "\u2019"))
    lines: list[list[str]] = [[]]
    for token in _tokens(text):
        if token == "\n":
            lines.append([])
        elif token not in _DROPPED and token.strip("."):
            lines[-1].append(_spelt(token))
    return [" ".join(line) for line in lines[: len(captions)]]


def _tokens(text: str) -> Iterator[str]:
    """Yields tokens in lower case, with punctuation and line ends. At each position, the longest match is used."""
    at = 0
    while at < len(text):
        best = _PLAIN.match(text, at)
        if best is None or best.group().lower() in _TWO_WORDS:
            best = max((match for rule in _RULES if (match := rule.match(text, at))), key=re.Match.end)
        token = best.group(best.lastindex or 0)
        at += len(token)
        if token == "\n" or not token.isspace():
            yield token.lower()


@lru_cache(maxsize=4096)
def _apart(character: str) -> str:
    """Replaces an unusual character: it stays in its word, becomes a token of its own, or is removed."""
    if unicodedata.category(character)[0] == "L" or unicodedata.category(character) == "Nd":
        return character
    return f" {character} " if _TOKENS_ALONE.match(character) else " "


def _spelt(token: str) -> str:
    plain = _SPELT.get(token, token)
    if plain != token or token.startswith("<"):
        return plain.replace(" ", "\u00a0")
    return re.sub(r"\s", "\u00a0", token.replace("(", "-lrb-").replace(")", "-rrb-"))
