"""`winnow stream`: a video that is read frame by frame, and asked about while it runs; and what it reads of clips."""

PLAN = "stc:keep=50% + snapkv:keep=1024"  # what is read where no other plan is named
