"""The predictor: serves the champion of every model name over HTTP, and follows the registry without dropping a request.

    models.py    which models are live; a thread that follows the registry
    checking.py  request bodies and items, checked against the bundle's own schema
    inference.py a bounded pool of threads
    app.py       the routes
    openapi.py   the schema of the API as it is right now
    launcher.py  starts and stops it as a detached process

Run by `python -m services.predictor`. It needs ONNX Runtime, tokenizers, NumPy and an object store; never torch,
transformers, pandas or Prefect, so that it stays small.
"""
