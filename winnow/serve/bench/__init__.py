"""Load on a server that speaks OpenAI's chat completions, with and without compression, interleaved in one run."""
