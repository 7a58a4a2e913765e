"""What commands share: exit codes, and types of options."""

from __future__ import annotations

import argparse

#: What commands on saved checkpoints say of their arguments.
A_CHECKPOINT = """\
a CHECKPOINT is
  a Hugging Face model folder (config.json and weights)
  a hub name, perhaps with revisions: NAME, NAME@REV,REV,..., NAME@step0..step512
  a Lightning .ckpt: of PythiaModule as it is; of another module with --config
  a folder of .ckpt files, or of model folders
"""

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def add_files(parser: argparse.ArgumentParser) -> None:
    """The options that ``.ckpt`` files need."""
    files = parser.add_argument_group("for .ckpt files")
    files.add_argument(
        "--config",
        metavar="FOLDER_OR_NAME",
        help="the language model's configuration, where the file is not of PythiaModule",
    )
    files.add_argument(
        "--prefix",
        help="where the language model is in the state dict, such as net.lm, if several fit",
    )
    files.add_argument(
        "--trust",
        action="store_true",
        help="read any pickled object; it can run code, so only for files that you trust",
    )


def add_device(group: argparse._ArgumentGroup) -> None:
    """Where and in what the model computes."""
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s"
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "auto"),
        default="float32",
        help="what is computed in; auto: as saved (default: %(default)s)",
    )
