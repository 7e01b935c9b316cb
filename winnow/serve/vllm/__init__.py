"""The vLLM plug-in: connector methods of winnow run inside vLLM, with its batching, paging and caches.

`register` is the entry point of `vllm.general_plugins`: vLLM calls it in each of its processes. Nothing changes for a
model until the operator configures it (`--hf-overrides '{"winnow": {"plan": "…"}}'`); see docs/vllm.md.

`classes` makes a subclass of each of vLLM's model classes. Of its two sides, `processor` is the one that counts: it
asks the methods how many placeholders stay, from shapes alone. `encoder` is the one that computes: it runs the same
methods, by the library's own engine, on what the encoder gives. `frame_text` puts the text of a video's frames between
the tokens that stay. `positions` gives kept tokens their 3-D positions.
"""

from __future__ import annotations


def register() -> None:
    """Put lazily made subclasses in the place of vLLM's multimodal classes."""
    from winnow.serve.vllm.classes import register_all

    register_all()
