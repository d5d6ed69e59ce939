"""The event bridge: takes what happened to a model, and asks Prefect for a training run when one is due.

authentication.py   who may send: a bearer token, or a Standard Webhooks signature
parsing.py          what may be sent: one Event as JSON, of bounded size
store_events.py     what an object store's webhook sends, as Events
event_queue.py      the one SQLite file: on disk before anybody is told "accepted"
decision.py         whether a run is due: leading edge, cool-down, budget, same data. No clock, no network
datasets.py         what lies in the datasets bucket, its digest, and what is new in it
prefect_api.py      the few calls to Prefect's REST API
following.py        a request from its first emission to the end of its run
dispatcher.py       the thread that decides, asks and follows
app.py              the routes
"""
