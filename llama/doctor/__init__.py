"""Whether this machine can train, and what to do where it cannot: `python -m llama.doctor`."""

from importlib import metadata

# Names of ours that packages on PyPI have too.
SHARED_NAMES = ("kernels", "tokenizer")


def refuse_clashes() -> None:
    """Raise `UserError` where PyPI's `kernels` or `tokenizer` is installed: both hide each other.

    Reads what the installed distributions call themselves; it takes milliseconds.
    """
    for name in SHARED_NAMES:
        if version := installed(name):
            from llama.cli import UserError

            raise UserError(
                f"the PyPI package {name} {version} is installed, and this project has a package "
                f"of that name: `pip uninstall {name}`, or use an environment of its own"
            )


def installed(name: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
