"""`python -m benchmarks.orchestrated_pipeline REQUEST RESULT`: one run through Prefect, as `millstream run` makes it."""

import os
import sys
from pathlib import Path
from typing import Any, cast

from benchmarks.pipeline_process import now, read_request, write_result


def main() -> None:
    from services.flow_process import configure_logging

    configure_logging()
    from prefect import Flow
    from prefect.logging.handlers import APILogHandler

    from flows.training_pipeline import training_pipeline

    num_calls = count_api_calls(os.environ["PREFECT_API_URL"])
    request = read_request(Path(sys.argv[1]))
    moments = {"imported": now()}

    def note_begin(flow: object, flow_run: object, state: object) -> None:
        """The last thing that Prefect does before it calls the flow's own code."""
        moments["body_began"] = now()

    outcome = cast(Flow, training_pipeline).with_options(on_running=[note_begin])(request)
    moments["body_ended"] = now()
    APILogHandler().flush()
    write_result(Path(sys.argv[2]), outcome.run_id, moments, api_calls=len(num_calls))


def count_api_calls(api_url: str) -> list[None]:
    """A list that grows by one with every HTTP request of this process to the Prefect server. Events go by websocket and are not in it."""
    import httpx

    calls: list[None] = []
    send, send_async = httpx.Client.send, httpx.AsyncClient.send

    def counting_send(self: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
        if str(request.url).startswith(api_url):
            calls.append(None)
        return send(self, request, **options)

    async def counting_send_async(self: httpx.AsyncClient, request: httpx.Request, **options: Any) -> httpx.Response:
        if str(request.url).startswith(api_url):
            calls.append(None)
        return await send_async(self, request, **options)

    httpx.Client.send, httpx.AsyncClient.send = counting_send, counting_send_async  # type: ignore[method-assign]
    return calls


if __name__ == "__main__":
    main()
