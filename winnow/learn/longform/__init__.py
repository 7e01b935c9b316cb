"""Long videos told apart by what happens in them: what Selective S4 is trained and tried on."""
