"""What a check is asked to do: the form in the Prefect UI."""

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ml.events import ModelName


class DriftRequest(BaseModel):
    """One check of one model's requests, new data and late labels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ModelName = Field(default="sentiment", description="name of the model in the registry")
    window_hours: float = Field(
        default=24, gt=0, le=24 * 90, description="how far back a check looks at most; it starts after the last one"
    )
    min_rows: int = Field(default=200, ge=50, le=100_000, description="distinct texts below which nothing is said")
    max_rows: int = Field(default=5_000, ge=100, le=50_000, description="texts compared on each side; a random sample of more")
    significance: float = Field(
        default=0.01, ge=0.005, le=0.2, description="chance of a false alarm in one check, all its tests together (Holm's correction)"
    )
    num_repeats: int = Field(default=2, ge=1, le=20, description="checks in a row that must find the same before an event is sent")
    min_labels: int = Field(default=100, ge=30, le=100_000, description="late labels below which nothing is said of the metric")
    drop_tolerance_points: float = Field(
        default=2.0, ge=0, le=100, description="how far the primary metric may lie below its test value, in points (hundredths)"
    )

    @model_validator(mode="after")
    def _sample_reaches_the_minimum(self) -> "DriftRequest":
        if self.max_rows < self.min_rows:
            raise ValueError(f"max_rows ({self.max_rows}) must be at least min_rows ({self.min_rows})")
        return self
