"""Recipe `github`: every drop reason, licences by text and by expression, headers, bad archives."""

import bz2
import gzip
import io
import lzma
import os
import random
import string
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import zstandard

from llama.cli import UserError
from llama.corpus import engine, raw
from llama.corpus.document import Document, Dropped, Noted, apply
from llama.corpus.sources import github, licences
from llama.corpus.steps import code
from llama.files import read_documents

MIT = """MIT License

Copyright (c) 2020 A. Person

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND.
"""
BSD2 = """Copyright 2020 A. Person. All rights reserved.

Redistribution and use in source and binary forms, with or without modification, are permitted
provided that the following conditions are met:

1. Redistributions of source code must retain the above copyright notice.
2. Redistributions in binary form must reproduce the above copyright notice.
"""
NAMES = "\n3. Neither the name nor its contributors may be used to endorse or promote products.\n"
ADVERTS = "\n4. All advertising materials mentioning features must display this.\n"
APACHE = "                 Apache License\n           Version 2.0, January 2004\n"
GPL = "GNU GENERAL PUBLIC LICENSE\nVersion 3, 29 June\nAlso the GNU Lesser General Public License"
LGPL = "GNU LESSER GENERAL PUBLIC LICENSE\n Version 3\n incorporates the GNU General Public License"
MPL = "Mozilla Public License Version 2.0\n Secondary: the GNU General Public License"
OWNED = "Copyright ACME. Unauthorized copying of this file, via any medium, is prohibited."
CODE = "def twice(number):\n    return 2 * number\n"
ALLOWED = github.Options().licences


def tree(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def items(top: Path, **options):
    """All items of the repositories below `top`, after the steps."""
    chosen = github.Options(source="mine", **options)
    plan = github.plan(chosen, [top])
    found = [i for unit in plan.units for piece in unit.pieces for i in plan.read(piece)]
    documents = [item for item in found if isinstance(item, Document)]
    rest = [item for item in found if not isinstance(item, Document)]
    return apply(github.steps(chosen), documents) + rest


def reasons(found) -> dict[str, str]:
    return {item.id: item.reason for item in found if isinstance(item, Dropped)}


def kept(found) -> dict[str, str]:
    return {item.id: item.meta["licence"] for item in found if isinstance(item, Document)}


def test_files_that_go_by_their_names(tmp_path):
    by_name = {
        "yarn.lock": "lock_file",
        "package-lock.json": "lock_file",
        "go.sum": "lock_file",
        "node_modules/x/a.js": "vendored",
        "src/third_party/a.c": "vendored",
        "vendor/a.go": "vendored",
        "a.min.js": "minified",
        "photo.png": "suffix",
        "data.json": "suffix",
        "LICENSE.md": "licence_file",
    }
    tree(tmp_path / "repo", {"LICENSE": MIT, "a.py": CODE, **dict.fromkeys(by_name, CODE)})
    tree(tmp_path / "repo", {"LICENSE.md": MIT})
    found = items(tmp_path)
    assert reasons(found) == {"repo/LICENSE": "suffix"} | {
        f"repo/{n}": r for n, r in by_name.items()
    }
    assert [i for i in found if isinstance(i, Document)] == [
        Document(
            "repo/a.py",
            CODE,
            "mine",
            {"repository": "repo", "path": "a.py", "licence": "MIT", "language": "Python"},
        )
    ]


def test_files_that_go_by_their_content(tmp_path):
    header = (
        "// Copyright 2019 B.\n//\n// This is free software under the GNU General Public License.\n"
    )
    by_content = {
        "binary.py": (b"\x7fELF\0\0", "binary"),
        "half16.py": (b"\xff\xfea\x00b", "binary"),
        "big.py": (b"x = 1\n" * 400, "too_large"),
        "empty.py": (b" \n\t\n", "empty"),
        "only.py": (b"# Copyright 2020 A. Person. All rights reserved.\n", "empty"),
        "wide.js": (b"a" * 1001 + b"\nb\n" * 99, "max_line_length"),
        "mean.js": (b"a" * 101 + b"\n", "mean_line_length"),
        "art.c": (b"| / \\ --+-- ***\n" * 9 + b"x", "alphanumeric"),
        "made.go": (b"// Code generated by protoc-gen-go. DO NOT EDIT.\npackage a\n", "generated"),
        "parser.c": (
            b"/* A Bison parser, made by GNU Bison 3.\n * Generated by bison. */\n",
            "generated",
        ),
        "copyleft.c": (header.encode() + b"int main;\n", "file_licence GPL"),
        "spdx.c": (b"// SPDX-License-Identifier: MPL-2.0\nint main;\n", "file_licence MPL"),
    }
    files = {name: content for name, (content, _) in by_content.items()}
    tree(tmp_path / "repo", {"package.json": '{"license": "MIT"}', **files})
    expected = {f"repo/{name}": reason for name, (_, reason) in by_content.items()}
    found = items(tmp_path, max_file_bytes=2000)
    assert reasons(found) == {"repo/package.json": "suffix"} | expected
    # only just good enough
    lines = [b"a" * 1000] + [b"b" * 90] * 100
    edge = {"a.js": b"\n".join(lines), "b.py": b"#" * 75 + b"a" * 25, "c.md": b"*do not edit* this"}
    edge["d.c"] = b"// SPDX-License-Identifier: GPL-2.0 OR MIT\nint main;\n"
    tree(tmp_path / "edge", {"package.json": '{"license": "MIT"}', **edge})
    assert set(kept(items(tmp_path))) >= {f"edge/{name}" for name in edge}


@pytest.mark.parametrize(
    "text, found",
    [
        (MIT, {"MIT"}),
        (MIT.replace("\n", "\r\n # "), {"MIT"}),
        (MIT.replace(", and/or sell", ""), set()),
        (MIT + "Commons Clause restriction", {"MIT", "restricted"}),
        (BSD2, {"BSD-2-Clause"}),
        (BSD2 + NAMES, {"BSD-3-Clause"}),
        (BSD2 + NAMES + ADVERTS, {"BSD-4-Clause"}),
        (BSD2 + NAMES + "4. It must include the following acknowledgment.", {"BSD-4-Clause"}),
        (BSD2 + "3. Say how to obtain complete source code.", {"BSD-2-Clause", "other"}),
        (BSD2.replace("are permitted", "are permitted for study"), set()),
        (APACHE, {"Apache-2.0"}),
        ("Licensed under the Apache License, Version 2.0 (the", {"Apache-2.0"}),
        ("Apache License 1.1", set()),
        (GPL, {"GPL"}),
        (LGPL, {"LGPL"}),
        ("GNU AFFERO GENERAL PUBLIC LICENSE", {"AGPL"}),
        (MPL, {"MPL"}),
        (OWNED, {"proprietary"}),
        ("Business Source License 1.1", {"restricted"}),
        ("Eclipse Public License - v 2.0", {"other"}),
        ("for any purpose, commercial or non-commercial, and by any means", set()),
        ("for non-commercial use", {"restricted"}),
        ("Licensed under the Apache 2.0 License", {"Apache-2.0"}),
        ("Ask us.", set()),
    ],
)
def test_licences_by_their_text(text, found):
    assert licences.read_text(text).texts == found


@pytest.mark.parametrize(
    "expression, good",
    [
        ("MIT", True),
        ("mit", True),
        ("MIT OR Apache-2.0", True),
        ("MIT/Apache-2.0", True),
        ("(MIT OR GPL-3.0-or-later)", True),
        ("GPL-2.0 or mit", True),
        ("MIT AND GPL-2.0", False),
        ("MIT AND (GPL-2.0 OR BSD-3-Clause)", True),
        ("MIT OR GPL-2.0 AND LGPL-2.1", True),
        ("(MIT OR GPL-2.0) AND LGPL-2.1", False),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("GPL-2.0 WITH Classpath-exception-2.0", False),
        ("BSD License", True),
        ("Apache License, Version 2.0", True),
        ("BSD-4-Clause", False),
        ("UNLICENSED", False),
        ("MIT FOO", False),
        ("((MIT) OR GPL-2.0", False),
    ],
)
def test_expressions(expression, good):
    declared = licences.expression(expression)
    assert licences.satisfied(declared, ALLOWED) is good
    # what is not good is refused too, or not understood
    verdict = licences.judge([licences.Evidence(declared)], ALLOWED)
    assert (verdict is not None and not verdict[1]) is good


def test_what_a_repository_says_of_itself(tmp_path):
    npm, dual = '{"license": "%s"}', "MIT OR GPL-2.0"
    says = {
        "none": ({}, "no_licence"),
        "mentioned": ({"readme.md": "MIT"}, "no_licence"),
        "file": ({"LICENSE": MIT}, "MIT"),
        "copying": ({"COPYING.txt": BSD2 + NAMES}, "BSD-3-Clause"),
        "two": ({"LICENSE-MIT": MIT, "LICENSE-APACHE": APACHE}, "Apache-2.0 AND MIT"),
        "tag": ({"LICENSE": "SPDX-License-Identifier: MIT"}, "(MIT)"),
        "gpl": ({"COPYING": GPL}, "licence GPL"),
        "lgpl": ({"LICENSE": LGPL}, "licence LGPL"),
        "mpl": ({"LICENSE": MPL}, "licence MPL"),
        "owned": ({"LICENSE": OWNED}, "licence proprietary"),
        "odd": ({"LICENSE": "Be good."}, "licence unknown"),
        "npm": ({"package.json": npm % "MIT"}, "MIT"),
        "npm2": (
            {"package.json": '{"licenses": [{"type": "MIT"}, {"type": "GPL"}]}'},
            "MIT OR GPL",
        ),
        "npm3": ({"package.json": npm % "UNLICENSED"}, "licence proprietary"),
        "npm4": ({"package.json": "[" * 99_999}, "no_licence"),
        "choice": ({"package.json": npm % dual, "LICENSE": MIT + GPL}, dual),
        "both": ({"LICENSE": MIT + GPL}, "licence GPL"),
        "against": ({"package.json": npm % "MIT", "LICENSE": GPL}, "licence GPL"),
        "docs": ({"LICENSE": MIT, "LICENSE-docs": "Creative Commons"}, "CC AND MIT"),
        "others": ({"LICENSE": MIT, "LICENSE-3RD-PARTY.txt": GPL}, "MIT"),
        "rust": ({"Cargo.toml": '[package]\nlicense = "MIT/Apache-2.0"'}, "MIT OR Apache-2.0"),
        "python": ({"pyproject.toml": '[project]\nlicense = {text = "BSD"}'}, "BSD-3-Clause"),
        "toml": ({"pyproject.toml": "[project"}, "no_licence"),
        "egg": (
            {"PKG-INFO": "License: UNKNOWN\nClassifier: License :: OSI Approved :: MIT License\n"},
            "MIT",
        ),
        "egg2": ({"PKG-INFO": "Name: x\nLicense-Expression: MIT AND PSF-2.0\n"}, "licence other"),
        "poetry": ({"pyproject.toml": '[tool.poetry]\nlicense = "MIT"'}, "MIT"),
        "crates": ({"Cargo.toml": '[workspace.package]\nlicense = "MIT"'}, "MIT"),
        "php": ({"composer.json": '{"license": ["MIT", "GPL-2.0-only"]}'}, "MIT OR GPL-2.0-only"),
        "cran": (
            {"DESCRIPTION": "Package: x\nLicense: MIT + file LICENSE\n", "LICENSE": "YEAR: 2020\n"},
            "MIT",
        ),
        "cran2": ({"DESCRIPTION": "License: GPL-3\n"}, "licence GPL"),
        "free": (
            {
                "Cargo.toml": '[package]\nlicense = "Unlicense OR MIT"',
                "UNLICENSE": "This is free and unencumbered software released into the public "
                "domain, for any purpose, commercial or non-commercial.",
            },
            "Unlicense OR MIT",
        ),
        "epl": (
            {"package.json": npm % "EPL-2.0 OR MIT", "LICENSE": MIT + "Eclipse Public License 2"},
            "EPL-2.0 OR MIT",
        ),
        "epl2": ({"LICENSE": MIT + "Eclipse Public License 2"}, "licence other"),
        "reuse": (
            {"LICENSES/MIT.txt": MIT, "LICENSES/CC0-1.0.txt": "Creative Commons"},
            "CC AND MIT",
        ),
        "reuse2": ({"LICENSES/MIT.txt": MIT, "LICENSES/GPL-2.0-only.txt": GPL}, "licence GPL"),
        "deb": ({"debian/copyright": "Format: x\n\nFiles: *\nLicense: Expat\n Text\n"}, "MIT"),
    }
    for name, (files, _) in says.items():
        tree(tmp_path / name, {**files, "a.py": CODE})
    found = items(tmp_path)
    dropped = reasons(found)
    got = {id.split("/")[0]: licence for id, licence in kept(found).items() if id.endswith("a.py")}
    got |= {n: dropped[f"{n}/a.py"] for n in says if f"{n}/a.py" in dropped}
    assert got == {name: said for name, (_, said) in says.items()}


def test_a_copy_within_is_judged_by_its_own_licence(tmp_path):
    files = {"LICENSE": MIT, "a.py": CODE, "lib/COPYING": GPL, "lib/deep/b.py": CODE}
    files |= {
        "lib/mine/LICENSE": BSD2,
        "lib/mine/c.py": CODE,
        "sub/package.json": "{}",
        "sub/d.js": CODE,
    }
    tree(tmp_path / "repo", files)
    found = items(tmp_path)
    assert kept(found) == {
        "repo/a.py": "MIT",
        "repo/lib/mine/c.py": "BSD-2-Clause",
        "repo/sub/d.js": "MIT",
    }
    assert reasons(found)["repo/lib/deep/b.py"] == "licence GPL"
    # one may ask for others
    assert "repo/lib/deep/b.py" in kept(items(tmp_path, licences=[*ALLOWED, "GPL"]))


def test_repositories_below_shelves(tmp_path):
    tree(tmp_path, {"owner/one/LICENSE": MIT, "owner/one/a.py": CODE, "list.txt": "x"})
    (tmp_path / "owner/two.zip").write_bytes(
        zipped({"two-main/LICENSE": MIT, "two-main/a.py": CODE})
    )
    assert set(kept(items(tmp_path))) == {"owner/one/a.py", "owner/two/a.py"}
    plan = github.plan(github.Options(), [tmp_path])
    assert [(left.name, left.reason) for left in plan.left_out] == [
        ("list.txt", "not in a repository")
    ]
    (tmp_path / "owner/one.tgz").write_bytes(tarred({"a.py": b""}))
    with pytest.raises(UserError, match="two repositories owner/one"):
        github.plan(github.Options(), [tmp_path])
    with pytest.raises(UserError, match=r"list.txt is no folder"):
        github.plan(github.Options(), [tmp_path / "list.txt"])
    with pytest.raises(UserError, match="--input"):
        github.plan(github.Options(), [])


def test_links_pipes_and_odd_names(tmp_path):
    repo = tree(
        tmp_path / "in/repo", {"LICENSE": MIT, "a\nb.py": CODE, os.fsdecode(b"\xff.py"): CODE}
    )
    tree(tmp_path, {"secret.py": CODE})
    (repo / "link.py").symlink_to(tmp_path / "secret.py")
    (repo / "loop").symlink_to(repo)
    (tmp_path / "in/away").symlink_to(tmp_path)
    os.mkfifo(repo / "pipe.py")
    tree(repo, {".git/config.py": CODE, ".github/ci.yml": "on: [push]\n"})
    # a submodule that is checked out, under a licence of its own, and one that is not
    tree(repo, {"sub/.git": "gitdir: ../.git/modules/sub\n", "sub/b.py": CODE, "sub/COPYING": GPL})
    (repo / "empty").mkdir()
    found = items(tmp_path / "in")
    assert set(kept(found)) == {"repo/a\nb.py", "repo/\\xff.py", "repo/.github/ci.yml"}
    special = ("repo/link.py", "repo/loop", "repo/pipe.py")
    suffix = ("repo/LICENSE", "repo/sub/.git", "repo/sub/COPYING")
    assert reasons(found) == dict.fromkeys(special, "special_file") | dict.fromkeys(
        suffix, "suffix"
    ) | {"repo/sub/b.py": "licence GPL"}


def test_encodings(tmp_path):
    text = "# Grüße an alle, die dies lesen\nx = 1\n"
    codecs = ("utf-8-sig", "utf-16", "windows-1252")
    tree(tmp_path / "repo", {"LICENSE": MIT, **{f"{c}.py": text.encode(c) for c in codecs}})
    found = items(tmp_path)
    assert {i.text for i in found if isinstance(i, Document)} == {text}
    assert {i for i in found if isinstance(i, Noted)} == {
        Noted(f"decoded as {name}") for name in ("utf-16", "windows-1252")
    }


def zipped(files: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (0o120777 if name == "link.py" else 0o100644) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return out.getvalue()


def tarred(files: dict[str, bytes], *more: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in more:
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    return out.getvalue()


def test_archives_in_memory(tmp_path):
    link = tarfile.TarInfo("r-1/link.py")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    again, up = tarfile.TarInfo("./r-1/a.py"), tarfile.TarInfo("r-1/../../up.py")
    again.size = 9
    files = {"r-1/a.py": CODE.encode(), "r-1/LICENSE": MIT.encode()}
    tree(tmp_path / "in", {"r.tar.gz": tarred(files, link, again)})
    tree(tmp_path / "in", {"z.zip": zipped({"LICENSE": MIT, "a.py": CODE, "link.py": "x"})})
    tree(tmp_path / "in", {"up.tgz": tarred({**files, "r-1/../../up.py": CODE.encode()}, up)})
    found = items(tmp_path / "in")
    assert set(kept(found)) == {"r/a.py", "z/a.py", "up/r-1/a.py"}
    assert reasons(found) == {
        "r/LICENSE": "suffix",
        "r/link.py": "special_file",
        "r/a.py": "repeated",
        "z/LICENSE": "suffix",
        "z/link.py": "special_file",
        "up/r-1/LICENSE": "suffix",
        "up/../up.py": "no_licence",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_archives_of_every_packing_whatever_their_name(tmp_path):
    plain = gzip.decompress(tarred({"r-1/a.py": CODE.encode(), "r-1/LICENSE": MIT.encode()}))
    packed = {
        "a.tar": plain,
        "b.tar.gz": gzip.compress(plain),
        "c.tar.bz2": bz2.compress(plain),
        "d.tar.xz": lzma.compress(plain),
        "e.tar.zst": zstandard.compress(plain),
        "f.crate": gzip.compress(plain),
        "misnamed.tgz": lzma.compress(plain),
    }
    tree(tmp_path / "in", packed)
    found = items(tmp_path / "in")
    assert set(kept(found)) == {f"{name.split('.')[0]}/a.py" for name in packed}


def test_damaged_archives_cost_their_rest(tmp_path, rng):
    noise = {f"{i}.py": (CODE + "# " + rng.randbytes(30).hex()).encode() for i in range(99)}
    data = tarred({"LICENSE": MIT.encode(), **noise})
    tree(tmp_path / "in", {"cut.tar.gz": data[: len(data) // 2], "no.tgz": b"no archive"})
    members = bytearray(zipped({"LICENSE": MIT, "bad.py": noise["0.py"], "good.py": CODE}))
    with zipfile.ZipFile(io.BytesIO(members)) as archive:
        members[archive.getinfo("bad.py").header_offset + 60] ^= 0xFF
    tree(tmp_path / "in", {"bad.zip": bytes(members)})
    chosen = github.Options(source="mine")
    plan = github.plan(chosen, [tmp_path / "in"])
    summary = engine.run(plan, github.steps(chosen), tmp_path / "out", 1, 1.0)
    assert summary.total["quarantined"] == {"damaged": 2, "unreadable": 2}
    ids = [d["id"] for d in read_documents(next((tmp_path / "out").glob("0*.zst")))]
    assert "bad/good.py" in ids and 5 < len(ids) < 99
    assert len(set(ids)) == len(ids)


def test_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "RATIO_FLOOR_BYTES", 1 << 20)
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 50 << 20
    bombs = {
        "file.tgz": tarred({"a.py": bytes(50 << 20)}),
        "header.tgz": gzip.compress(header.tobuf() + bytes(50 << 20)),
        "member.zip": zipped({"a.py": "0" * (50 << 20)}),
    }
    for name, data in bombs.items():
        tree(tmp_path / name[:4], {name: data})
        with pytest.raises(ValueError, match="bomb"):
            items(tmp_path / name[:4])


NOTICE = "Copyright (c) 2019 A. Person"
KEPT_HEADERS = [
    ("C", "#include <stdio.h>\n#define LICENSE 1\nint x;\n"),
    ("C", "/* Sorts a list in place. */\n#include <a.h>\n"),
    ("Python", '#!/usr/bin/env python\n# -*- coding: utf-8 -*-\n"""Reads files."""\nx = 1\n'),
    ("Python", '"""Checks the license of a package by its text."""\nx = 1\n'),
    ("Markdown", "# Copyright and licence\n\nWords about them.\n"),
    ("Haskell", "-- | Module: Data.Tree\n-- Trees of numbers.\nmodule Data.Tree where\n"),
    ("SQL", "-- all users that have paid\nselect 1;\n"),
    ("C", "/* never closed Copyright 2020 A.\nint x;\n"),
    ("Python", "# Copyright notices are parsed here: see parse().\nimport x\n"),
    ("C", "#include <a.h>\n/* Copyright 2020 A. */\nint x;\n"),
    ("reStructuredText", ".. Copyright 2020 A.\n\nTitle\n=====\n"),
]


@pytest.mark.parametrize("language, text", KEPT_HEADERS)
def test_what_is_no_notice_stays(language, text):
    assert code.without_header(text, language)[0] == text


@pytest.mark.parametrize(
    "language, text, expected",
    [
        ("C", f"/* {NOTICE} */\n\n#include <a.h>\n", "#include <a.h>\n"),
        ("C", f"// {NOTICE}\n// MIT license.\n\n#define A\n", "#define A\n"),
        ("C", f"/*\n * {MIT}\n */\nint x;\n", "int x;\n"),
        ("C", f"/* a.c: sorts\n *\n * {NOTICE}\n */\nint x;\n", "/* a.c: sorts\n *\n */\nint x;\n"),
        ("C", f"// SPDX-License-Identifier: MIT\n/*\n * {NOTICE}\n */\nint x;\n", "int x;\n"),
        ("Java", f"/* {NOTICE} */ package a;\n", " package a;\n"),
        ("Python", f"#!/bin/python\n# {NOTICE}\nx = 1\n", "#!/bin/python\nx = 1\n"),
        ("Python", f"# {NOTICE}\n# -*- coding: latin-1 -*-\nx\n", "# -*- coding: latin-1 -*-\nx\n"),
        ("Python", f'"""Title.\n\n{NOTICE}\n"""\nx = 1\n', '"""Title.\n\n"""\nx = 1\n'),
        ("Python", f"# {NOTICE}\n\n# What it does.\nx = 1\n", "# What it does.\nx = 1\n"),
        (
            "Go",
            "// Copyright 2009 B.\n// Use is governed by a BSD-style\n// license in LICENSE.\n\n"
            "//go:build linux\n\npackage a\n",
            "//go:build linux\n\npackage a\n",
        ),
        ("Python", "# Authors: A\n#   B\n# License: BSD 3 clause\nx\n", "# Authors: A\n#   B\nx\n"),
        ("Shell", f"#!/bin/sh\n# {NOTICE}\n# usage: x\n", "#!/bin/sh\n# usage: x\n"),
        ("Python", f"# {NOTICE},\n# and B.\nx = 1\n", "x = 1\n"),
        (
            "PHP",
            "<?php\n\ndeclare(strict_types=1);\n\n/*\n * This file is part of X.\n *\n"
            " * (c) A\n *\n * The full copyright and license: see LICENSE.\n */\n\necho 1;\n",
            "<?php\n\ndeclare(strict_types=1);\n\necho 1;\n",
        ),
        (
            "C",
            f"#ifndef A_H\n#define A_H\n/* {NOTICE} */\nint x;\n",
            "#ifndef A_H\n#define A_H\nint x;\n",
        ),
        ("INI", f"# {NOTICE}\n[a]\n", "[a]\n"),
        ("C++", "// Distributed under the Boost Software License.\nint x;\n", "int x;\n"),
        ("PHP", f"<?php\n/** {NOTICE} */\necho 1;\n", "<?php\necho 1;\n"),
        ("HTML", f"<!DOCTYPE html>\n<!-- {NOTICE} -->\n<p>x\n", "<!DOCTYPE html>\n<p>x\n"),
        ("Haskell", f"{{- {NOTICE} -}}\n-- | Trees\nmodule A\n", "-- | Trees\nmodule A\n"),
        ("Lua", f"--[[ {NOTICE} ]]\nx = 1\n", "x = 1\n"),
        ("Lisp", f";;; {NOTICE}\n(defun a ())\n", "(defun a ())\n"),
        ("Shell", f"#!/bin/sh\n{MIT}"[:10] + f"# {NOTICE}", "#!/bin/sh\n"),
    ],
)
def test_notices_are_cut(language, text, expected):
    assert code.without_header(text, language)[0] == expected
    # what is left is left alone
    assert code.without_header(expected, language) == (expected, "")


def test_statistics_are_redpajamas(rng):
    signs = string.printable + "äß字١²½\u2028\x85\x1c"
    for _ in range(300):
        text = "".join(rng.choices(signs, k=rng.randrange(1, 200)))
        text = text.encode("ascii", "ignore").decode() if rng.random() < 0.3 else text
        lines = text.splitlines()
        if lines:
            share = sum(1 for sign in text if sign.isalnum()) / len(text)
            assert code.measure(text) == (max(map(len, lines)), len(text) / len(lines), share)
    assert code.measure("") == (0, 0, 0)


def test_every_language_is_found_by_its_names():
    assert code.language("src/A.CPP") == "C++" and code.language("x/Makefile") == "Make"
    assert code.language("CMakeLists.txt") == "CMake" and code.language("notes.txt") == ""
    assert len({code.language(f"a.{name}") for name in code._BY_NAME}) >= 70


@pytest.mark.slow
@pytest.mark.parametrize(
    "unit",
    [
        "/*",
        "/* copyright 2020 the */\n",
        "// c 2020\n",
        "# copyright\n#\n",
        " ",
        "#!\n",
        "<!doctype",
    ]
    + ['"""', "copyright ", "/*\n\n", "(", "MIT OR ", "SPDX-License-Identifier: (", "License: x\n"]
    + ["declare(", "# distributed under the ", "# copyright a\n", "// c 2020 a, and\n"]
    + ["// generated ", "Files: *\n", "[a]\n", "<?xml "],
)
def test_hostile_files_take_linear_time(unit):
    def seconds(size: int) -> float:
        text, begin = unit * (size // len(unit)), time.process_time()
        for language in ("C", "Python", "HTML"):
            meta = {"language": language}
            list(code.clean(iter([Document("a", text, "s", meta)]), allowed=ALLOWED))
        for name in ("LICENSE", "package.json", "PKG-INFO", "pyproject.toml", "debian/copyright"):
            licences.judge([licences.evidence(name, text)[1]], ALLOWED)
        return time.process_time() - begin

    seconds(1000)
    assert seconds(400_000) <= 8 * seconds(100_000) + 0.2


def test_ids_hold_for_any_seed(tmp_path):
    names = [f"{i}/a.py" for i in range(9)]
    random.shuffle(names)
    tree(tmp_path / "in/repo", {"LICENSE": MIT, **dict.fromkeys(names, CODE)})
    first, second = (list(kept(items(tmp_path / "in"))) for _ in range(2))
    assert first == second == [f"repo/{name}" for name in sorted(names)]
