"""`winnow stream`: a video that is read frame by frame, and asked about while it runs."""
