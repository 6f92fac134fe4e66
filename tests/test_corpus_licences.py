"""Licences of repositories: by their text, by an expression, by what a package says of itself."""

import pytest
from made_github import (
    ADVERTS,
    ALLOWED,
    APACHE,
    BSD2,
    CODE,
    GPL,
    LGPL,
    MIT,
    MPL,
    NAMES,
    OWNED,
    items,
    kept,
    reasons,
    tree,
)

from llama.corpus.sources import licences


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
