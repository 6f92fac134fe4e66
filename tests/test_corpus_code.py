"""Source code: notices in headers, statistics, names of languages, hostile files."""

import string
import time

import pytest
from made_github import ALLOWED, MIT

from llama.corpus.document import Document
from llama.corpus.sources import licences
from llama.corpus.steps import code

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
