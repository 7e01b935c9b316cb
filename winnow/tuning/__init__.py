"""Finding a plan: many candidates, few questions; few candidates, many questions; a check on questions held out."""
