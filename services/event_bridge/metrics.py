"""What the bridge counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

PREFIX = "millstream_bridge"


class BridgeMetrics:
    """The counters of one bridge, since its process started."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"{PREFIX}_{name}", text, labels, registry=self._registry)

        self.accepted = counter("events_accepted", "Events kept", ("kind",))
        self.refused = counter("events_refused", "Requests refused", ("reason",))
        self.ignored = counter("store_events_ignored", "What a store reported and no model trains on", ("reason",))
        self.replayed = counter("events_replayed", "Events that were there already")
        self.coalesced = counter("events_coalesced", "Events put together with an earlier one into one request")
        self.same_data = counter("events_same_data", "Events closed because the model was trained on this very data")
        self.over_budget = counter("over_budget", "Times that a request had to wait for the daily budget")
        self.requests = counter("requests", "Requests for a training run made")
        self.emitted = counter("requests_emitted", "Times that retrain.requested was emitted to Prefect")
        self.runs_seen = counter("runs_seen", "Flow runs that came of a request")
        self.runs_crashed = counter("runs_crashed", "Flow runs of a request that crashed")
        self.prefect_unreachable = counter("prefect_unreachable", "Times that Prefect did not answer, or refused")
        self.store_unreachable = counter("store_unreachable", "Listings that the object store did not answer")
        self.waiting_events = Gauge(f"{PREFIX}_events_waiting", "Events that nothing was decided about", registry=self._registry)
        self.open_requests = Gauge(f"{PREFIX}_requests_open", "Requests whose run has not ended", registry=self._registry)

    def render(self, waiting_events: int, open_requests: int) -> bytes:
        """In Prometheus's text format."""
        self.waiting_events.set(waiting_events)
        self.open_requests.set(open_requests)
        return generate_latest(self._registry)
