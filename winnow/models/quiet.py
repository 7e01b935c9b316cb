"""Silence of the libraries, for programs whose output is their own."""

from __future__ import annotations

import logging

import transformers


def quiet() -> None:
    """Nothing of transformers or the Hub's client on the terminal but their errors."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
