"""`winnow studio`: a page on this machine that asks about a picture and draws what each plan kept of it.

One process, one model, one thread that touches it. `app` has the routes, `guard` stands before them, `asking` turns a
body into something to answer, `answering` answers it, `stages` says what became of the tokens, and `stores` opens what
`winnow bench` wrote. `page/` is what the browser runs. Needs the extra `[studio]`.
"""
