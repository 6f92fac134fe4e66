"""Repositories for the recipe `github`: texts of licences, and what becomes of files."""

from pathlib import Path

from llama.corpus.document import Document, Dropped, apply
from llama.corpus.sources import github

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
