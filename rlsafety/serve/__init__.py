"""A trained policy as a thing that others can question: over HTTP and as a model of Inspect.

  steps      the arrays: a batch of rows that join and leave between chunks of decode steps
  adapters   names of models (`base`, `runs/x`, `runs/x@step120`) -> adapters side by side
  engine     the thread that owns the device: admits requests, advances rows, hands tokens out
  text       tokens -> text as it grows, stop strings, log-probs per token
  protocol   bodies of requests -> what is wanted, and answers, in OpenAI's form
  app        the HTTP server: `python -m rlsafety.serve`
  inspect_provider   the same engine in process, as a model of Inspect
"""
