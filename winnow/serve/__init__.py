"""`winnow serve`: chat completions in OpenAI's shape, with compression as a field of the request.

One process, one model, one thread that touches it. `server` starts everything, `app` has the routes, `guard` stands
before them, `reading` turns a body into a job, and `engine` answers jobs in batches. Needs the extra `[serve]`.
"""
