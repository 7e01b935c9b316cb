"""What methods look at. `vision` and `language` hold the signals; `attention` computes them; `tap` obtains them."""
