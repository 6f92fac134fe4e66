"""Whether this machine can train, and what to do where it cannot: `python -m llama.doctor`.

In: the machine. Out: a line per finding with a verdict: ok, note (training works, read this) or
problem. Python alone is needed here, so that whatever is missing or broken is a finding.
"""

import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from llama.doctor import machine, software
from llama.doctor.finding import Finding

WIDTH = 80
CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    software.python,
    software.packages,
    software.torch_and_gpus,
    software.optional,
    software.names,
    machine.processor,
    machine.disks,
    machine.network,
    machine.environment,
)


def examine() -> list[Finding]:
    """All findings; a check that fails itself is one of them."""

    def checked(check: Callable[[], list[Finding]]) -> list[Finding]:
        try:
            return check()
        except Exception as error:  # whatever is wrong with a machine, the other checks count
            text = f"cannot be checked: {type(error).__name__}: {error}"
            return [Finding("note", check.__name__.replace("_", " "), text)]

    with ThreadPoolExecutor(4) as pool:
        return [finding for found in pool.map(checked, CHECKS) for finding in found]


def listing(findings: Sequence[Finding]) -> str:
    """Findings in 80 columns: verdict, name, text, and what to do below it."""
    lines = []
    for verdict, name, text, todo, _ in findings:
        for head, part in ((f"{verdict:<9}{name:<13}", text), (f"{'':<22}-> ", todo)):
            if part:
                # what an import printed may hold line ends and colours
                part = re.sub(r"[\x00-\x1f\x7f]+", " ", part)
                below = " " * len(head)
                lines += textwrap.wrap(part, WIDTH, initial_indent=head, subsequent_indent=below)
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    if argv:
        from llama import cli

        cli.parser("python -m llama.doctor", "Whether this machine can train.").parse_args(argv)
    findings = examine()
    print(listing(findings))
    fatal = sum(finding.fatal for finding in findings)
    count = {v: sum(f.verdict == v for f in findings) for v in ("problem", "note")}
    verdict = "training is not possible here" if fatal else "training works here"
    problems = f"{count['problem']} problem{'s' * (count['problem'] != 1)}"
    print(f"\n{verdict}: {problems}, {count['note']} note{'s' * (count['note'] != 1)}")
    return 1 if fatal else 0


if __name__ == "__main__":
    try:
        from llama import cli
    except ImportError:
        # a missing package is what this command is there to name
        sys.exit(main([]))
    cli.run(main)
